"""Configuration group `batch`."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.fields import path_field


@dataclass
class BatchConfig:
    """Defaults for what requests leave out, and limits on input rows."""

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
    predictor: str | None = path_field()  # folder of `lengths train`; null: a request's limit counts as its length
    # KV cache reserved for an answer: its own limit, or the predictor's bound; answers that outgrow it are preempted
    admission: str = "worst_case"  # worst_case | q95 | q90
    replay: str | None = None  # trace: requests arrive at their arrival_seconds and are ordered by batch.policy
    policy: str = "fcfs"  # of a replay: fcfs | sjf (own limits as lengths) | ssjf | longest_first | prompt_length
