"""A micro-batch: the slots that pass through the pipeline together, and the bounds on how many those may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A free slot waits for company, where prefill of more rows is cheaper a row; but not for more rounds than this.
PATIENCE_ROUNDS = 8


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch's way through the pipeline. `slots` in ascending order; results are read for those in `live`.

    `sequences`: the numbers of the sequences that prefill brings in, in the order they were added; () in decode.
    """

    number: int
    phase: str
    slots: tuple[int, ...]
    live: tuple[int, ...]
    sequences: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class MicroBatchLimits:
    """Bounds of micro-batches: rows of each phase; `prefill_tokens` padded tokens (but at least one row).

    `batch_invariant`: decode takes the whole group, live or not, and prefill one row, so that a row's arithmetic does
    not depend on which others it runs with. `row_buckets`: decode takes a power of two of the group's first slots, so
    that few shapes are met.
    """

    prefill_rows: int
    prefill_tokens: int
    decode_rows: int
    patience_rounds: int = PATIENCE_ROUNDS
    batch_invariant: bool = False
    row_buckets: bool = False


def cut_prefill(prompt_tokens: Sequence[int], rows: int, tokens: int) -> list[MicroBatch]:
    """Cuts prompts of these lengths, in order, into prefill micro-batches of at most `rows` rows and `tokens` padded
    tokens (at least one row each). Slot k is the k-th prompt.

    The bound on tokens keeps the workspace that the plan reserved when prompts are longer than it expected.
    """
    spans: list[range] = []
    start, longest = 0, 0
    for row, length in enumerate(prompt_tokens):
        longest = max(longest, length)
        size = row - start + 1
        if row > start and (size > rows or size * longest > tokens):
            spans.append(range(start, row))
            start, longest = row, length
    if prompt_tokens:
        spans.append(range(start, len(prompt_tokens)))
    return [MicroBatch(number, "prefill", tuple(span), tuple(span)) for number, span in enumerate(spans)]
