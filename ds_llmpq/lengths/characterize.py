"""The distribution of output lengths, by model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds_llmpq.lengths.dataset import collect_lengths
from ds_llmpq.lengths.records import Example

ALL = "all"


def group_lengths(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Output tokens of all models together, then, if there are several, of each; most examples first."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.model or "?", []).append(example)
    found = {ALL: collect_lengths(examples)}
    if len(groups) > 1:
        found |= {
            name: collect_lengths(groups[name]) for name in sorted(groups, key=lambda name: (-len(groups[name]), name))
        }
    return found


def describe_distribution(tokens: np.ndarray) -> dict[str, float]:
    """Mean, percentiles, the tail ratio p99 / p50, and the expected longest of 8, 16 and 32 answers, for which a
    micro-batch must be planned that runs until its longest row ends."""
    p50, p90, p95, p99 = np.percentile(tokens, [50, 90, 95, 99])
    found = {"answers": len(tokens), "mean": float(tokens.mean()), "p50": p50, "p90": p90, "p95": p95, "p99": p99}
    found |= {"max": float(tokens.max()), "tail_ratio": p99 / p50}
    found |= {f"longest_of_{rows}": estimate_maximum(tokens, rows) for rows in (8, 16, 32)}
    return {name: float(value) for name, value in found.items()}


def estimate_maximum(tokens: np.ndarray, rows: int) -> float:
    """Expected longest of `rows` independent answers: sum_k x_(k) ((k/n)^rows - ((k-1)/n)^rows)."""
    ordered = np.sort(tokens)
    share = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(share**rows))
