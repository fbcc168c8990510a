"""Configuration groups `lengths`, `task` and `proxy`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_llmpq.fields import path_field


@dataclass
class LengthDataConfig:
    """How past answers become training data."""

    layout: str = "auto"  # auto | rows | lmsys | results
    input: str | None = path_field()  # the batch file that a results.jsonl answers (layout results)
    model: str | None = None  # only this model's answers; null: all
    rounds: str = "single"  # single: the first turn of a conversation | multi: every turn, its history as text
    limit: int | None = None  # at most so many examples, drawn with the seed
    truncation: str = "tail"  # which part of a long prompt is kept: tail | head_tail
    max_tokens: int = 512  # of a prompt, for the predictor
    tokenizer: str | None = path_field()  # local folder, counts tokens of answers given as text; null: words and marks
    test_share: float = 0.2
    validation_share: float = 0.2
    seed: int = 0


@dataclass
class LengthTaskConfig:
    """What is predicted, and with which loss."""

    # regression | binary | multiclass | multiclass_ordinal | binary_ordinal | pairwise
    kind: str = "regression"
    loss: str = "l1"  # regression, ordinal: l1 | mse | quantile
    percentiles: list[float] | None = None  # class boundaries; null: 50 (binary), 25 50 75 99 (multi-class)
    quantiles: list[float] = field(default_factory=lambda: [0.9, 0.95])  # upper bounds, calibrated on validation data


@dataclass
class ProxyConfig:
    """What predicts."""

    kind: str = "ngrams"  # ngrams: hashed n-grams and prompt length, linear | encoder: a Hugging Face encoder
    features: int = 16384  # ngrams: columns
    alpha: float | None = None  # ngrams: ridge; null: chosen on validation data
    path: str | None = path_field()  # encoder: local folder
    epochs: int = 6  # encoder: the first half trains all layers, the second the head alone
    batch_size: int = 16
    learning_rate: float = 1e-5
    hidden: int = 128  # of the head


@dataclass
class LengthsConfig:
    """`ds-llmpq lengths prepare | train | evaluate | predict | characterize`."""

    out: str = path_field("")
    action: str = ""
    data: str | None = path_field()  # past answers (JSON lines, CSV, parquet), or a folder that `prepare` wrote
    input: str | None = path_field()  # predict: prompts, an OpenAI batch file or rows like data's
    predictor: str | None = path_field()  # evaluate, predict: a folder that `train` wrote
    lengths: LengthDataConfig = field(default_factory=LengthDataConfig)
    task: LengthTaskConfig = field(default_factory=LengthTaskConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
