"""The shape of the configuration of `ds-llmpq lengths` and `ds-llmpq simulate`; see `schema`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ArrivalsConfig:
    """When jobs come."""

    kind: str = "poisson"  # poisson | gamma | uniform | together | trace
    rate: float = 0.2  # jobs a second
    load: float | None = None  # instead of a rate: share of what all slots could do if none were ever padded or empty
    cv: float = 1.0  # gamma: coefficient of variation of the gaps
    trace: str | None = None  # file with the columns TIMESTAMP, ContextTokens, GeneratedTokens
    start_row: int = 0
    scale: float = 1.0  # stretches the trace's gaps


@dataclass
class AnswersConfig:
    """How long prompts and answers are."""

    kind: str = "lognormal"  # lognormal | data | trace (the trace's own lengths)
    median_tokens: float = 110.0
    sigma: float = 1.2  # of the logarithm
    max_tokens: int = 512
    prompt_median_tokens: float = 100.0
    prompt_sigma: float = 1.0
    data: str | None = None  # JSON lines with output_tokens, also prompt_tokens and predicted_tokens if known


@dataclass
class PredictionConfig:
    """What a scheduler is told about lengths."""

    kind: str = "classes"  # oracle | noisy | classes | constant | data (the file's predicted_tokens)
    sigma: float = 0.65  # noise on the logarithm of the length; with classes: about 0.6 of them are right
    percentiles: list[float] = field(default_factory=lambda: [25, 50, 75, 99])  # class boundaries
    latency_seconds: float = 0.0  # charged per job


@dataclass
class ExecutionConfig:
    """What running costs."""

    kind: str = "constant"  # constant | plan
    constant_seconds: float = 0.1
    per_token_seconds: float = 0.02
    plan: str | None = None  # plan.json whose stage times are used


@dataclass
class GuardConfig:
    """Against starvation: aging | overdue | none; null switches a bound off."""

    kind: str = "aging"
    threshold_seconds: float | None = 300.0
    coefficient: float | None = 30.0


@dataclass
class SimulateConfig:
    """`ds-llmpq simulate`: runs one set of jobs under several policies."""

    out: str = ""
    mode: str = "right"  # right | reference (the published simulator, on the cases of a file)
    cases: str | None = None
    policies: list[str] = field(default_factory=lambda: ["fcfs", "ssjf", "sjf"])
    batching: str = "none"  # none | static | dynamic | continuous
    max_batch: int = 4  # slots, unless batching=none
    batch_wait_seconds: float = 0.0  # how long a partial static or dynamic batch waits to fill
    jobs: int = 1000
    repeats: int = 5  # with seeds seed, seed + 1, ...
    seed: int = 0
    published: bool = False  # also measure as the published evaluation did, on 50 jobs a repeat
    arrivals: ArrivalsConfig = field(default_factory=ArrivalsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass
class LengthDataConfig:
    """How answers of the past become training data."""

    layout: str = "auto"  # auto | rows | lmsys | results
    input: str | None = None  # the batch file that a results.jsonl answers (layout results)
    model: str | None = None  # only this model's answers; null: all
    rounds: str = "single"  # single: the first turn of a conversation | multi: every turn, its history as text
    limit: int | None = None  # data size: so many examples, drawn with the seed
    truncation: str = "tail"  # which part of a long prompt is kept: tail | head_tail
    max_tokens: int = 512  # of a prompt, for the predictor
    tokenizer: str | None = None  # local folder: counts tokens of answers given as text; null: words and marks
    test_share: float = 0.2
    validation_share: float = 0.2
    seed: int = 0


@dataclass
class LengthTaskConfig:
    """What is predicted, and what it is trained for."""

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
    path: str | None = None  # encoder: local folder
    epochs: int = 6  # encoder: the first half trains all layers, the second the head alone
    batch_size: int = 16
    learning_rate: float = 1e-5
    hidden: int = 128  # of the head


@dataclass
class LengthsConfig:
    """`ds-llmpq lengths prepare | train | evaluate | predict | characterize`."""

    out: str = ""
    action: str = ""
    data: str | None = None  # answers of the past (JSON lines, CSV, parquet), or a folder that `prepare` wrote
    input: str | None = None  # predict: prompts, an OpenAI batch file or rows like data's
    predictor: str | None = None  # evaluate, predict: a folder that `train` wrote
    lengths: LengthDataConfig = field(default_factory=LengthDataConfig)
    task: LengthTaskConfig = field(default_factory=LengthTaskConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)


# overrides whose values are paths
PATH_KEYS = frozenset(
    (
        *("cases", "data", "predictor", "arrivals.trace", "answers.data", "execution.plan"),
        *("lengths.input", "lengths.tokenizer", "proxy.path", "batch.predictor"),
    )
)
