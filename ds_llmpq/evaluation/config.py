"""Configuration group `evaluation`."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.fields import path_field

SCORES_NAME = "scores.json"


@dataclass
class EvaluationConfig:
    """What `evaluate` measures: a text's perplexity against full precision, or tasks of lm-evaluation-harness."""

    text: str | None = path_field()  # a UTF-8 file; null: held-out source files of Python's standard library
    row_tokens: int | None = None  # tokens a row; null: the model's positions, at most 1024
    limit_tokens: int | None = None  # score only about so many tokens, in rows spread evenly over the text
    reference: bool = True  # also score the unquantized model: loss increase, KL, agreement
    reference_bytes: int = 1 << 30  # for a file of its distributions; KL covers as many tokens as fit
    tasks: list[str] | None = None  # instead of a text: names of lm-evaluation-harness tasks
    tasks_path: str | None = path_field()  # folder of task files; null: the tasks that come with the harness
    fewshot: int | None = None
    limit_documents: int | None = None


@dataclass(frozen=True)
class ScoringTask:
    """What the ranks of an evaluation need. `settings` has absolute paths on rank 0's host. `reference` is a file on
    the last stage's host with the predictions of the unquantized model: it is written if `keeps_reference`, else
    compared with; None: neither."""

    settings: EvaluationConfig
    reference: str | None = None
    keeps_reference: bool = False
