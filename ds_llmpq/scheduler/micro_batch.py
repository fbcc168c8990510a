"""A micro-batch: the slots that pass through the pipeline together, and the bounds on how many those may be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ds_llmpq.cost.captured_graphs import row_bucket

# A free slot waits for company, where prefill of more rows is cheaper a row; but not for more rounds than this.
PATIENCE_ROUNDS = 8
# Of stages that are graphs: tokens of a call of prompts alone, and of one with decode rows, which takes so many or a
# multiple, and the least of them that are left to prompts (docs/decisions.md).
_PREFILL_TOKENS, _MIXED_TOKENS, _LEAST_PROMPT_TOKENS = 128, 64, 32


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch's way through the pipeline. `slots` in ascending order; results are read for those in `live`.

    `sequences`: the numbers of the sequences that prefill brings in, in the order they were added; () in decode.
    `past`: how many tokens of each row the cache has already: a shared prefix, or what earlier chunks of a long prompt
    have computed. `tokens`: of a chunk, 0 where prompts are computed to their ends; a chunk that is not the last has no
    live slot. `joined`: it passes in one call with the micro-batch before it.
    """

    number: int
    phase: str
    slots: tuple[int, ...]
    live: tuple[int, ...]
    sequences: tuple[int, ...] = ()
    past: int = 0
    tokens: int = 0
    joined: bool = False

    @property
    def size(self) -> int:
        return len(self.slots)


def take_call(scheduled: deque[MicroBatch]) -> list[MicroBatch]:
    """Takes the next micro-batch, and those that pass in one call with it."""
    call = [scheduled.popleft()]
    while scheduled and scheduled[0].joined:
        call.append(scheduled.popleft())
    return call


@dataclass(frozen=True)
class MicroBatchLimits:
    """Bounds of micro-batches: rows of each phase; `prefill_tokens` padded tokens (but at least one row), which keeps
    the workspace that the plan reserved when prompts are longer than it expected. `chunked`: a longer prompt passes in
    chunks of so many tokens, one at each visit, so that decode goes on meanwhile.

    `batch_invariant`: decode takes the whole group, live or not, and prefill one row, so that a row's arithmetic does
    not depend on which others it runs with. `row_buckets`: decode takes a power of two of the group's first slots, so
    that few shapes are met; with `cache_blocks` its passes are filled up on the device (`count_rows`).

    `cache_blocks`: how many blocks of `block_tokens` positions of the KV cache all slots share, each holding what its
    tokens need; decode then takes running slots alone, whichever they are. 0: slots have positions of their own.

    `ragged`: passes take rows of any lengths at any positions, as stages that are graphs do. Decode takes running slots
    alone there too, and a visit's prompts, as far as `count_prompt_tokens` goes, pass in one call with its decode rows.
    """

    prefill_rows: int
    prefill_tokens: int
    decode_rows: int
    patience_rounds: int = PATIENCE_ROUNDS
    batch_invariant: bool = False
    row_buckets: bool = False
    chunked: bool = False
    cache_blocks: int = 0
    block_tokens: int = 1
    ragged: bool = False

    def count_rows(self, batch: MicroBatch, slots: int) -> int:
        """Rows that a stage computes for the micro-batch, of a stream over so many slots."""
        if batch.phase == "decode" and self.row_buckets and self.cache_blocks:
            return max(batch.size, min(row_bucket(batch.size), slots))
        return batch.size

    def count_prompt_tokens(self, decode_rows: int) -> int:
        """How many tokens of prompts may pass in one call with so many decode rows."""
        calls = -(-(decode_rows + _LEAST_PROMPT_TOKENS) // _MIXED_TOKENS)
        room = calls * _MIXED_TOKENS - decode_rows if decode_rows else _PREFILL_TOKENS
        return min(room, self.prefill_tokens)
