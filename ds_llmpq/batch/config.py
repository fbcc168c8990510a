"""Configuration group `batch`."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.fields import path_field


@dataclass
class BatchConfig:
    """Defaults for what a request leaves out, and limits on input rows."""

    max_tokens: int = 128
    temperature: float = 0.0  # greedy: offline batches want repeatable answers
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    max_row_bytes: int = 4 * 1024 * 1024
    limit: int | None = None  # only the first so many requests
    # arrival | prompt_length | predicted_length | bucketed; null: predicted_length, or arrival in a replay
    order: str | None = None
    predictor: str | None = path_field()  # folder of `lengths train`; null: a request's own limit stands for its length
    # cache positions reserved for an answer: by its own limit, or the predictor's bound; what outgrows it is preempted
    admission: str = "worst_case"  # worst_case | q95 | q90
    replay: str | None = None  # trace: requests come at their rows' arrival_seconds, in the order of batch.policy
    policy: str = "fcfs"  # of a replay: fcfs | sjf (own limits as lengths) | ssjf | longest_first | prompt_length
