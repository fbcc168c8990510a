"""What every stage knows of the sequences in flight. Pure state: the same on all ranks, changed by the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ds_llmpq.engine.wave import WaveRow
from ds_llmpq.scheduler.scheduler import Pass


class Finish(IntEnum):
    """Why a sequence left its slot; travels with its last token."""

    RUNNING = 0
    STOP = 1  # an end-of-sequence token or a stop string
    LENGTH = 2  # max_tokens reached
    BROKEN = 3  # the model's logits were not numbers
    OVERRUN = 4  # its slot is full and it has not ended: to be admitted again with more room


@dataclass(frozen=True)
class MicroBatch:
    """Rows [start, stop) of requests that pass once."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def rows(self) -> range:
        return range(self.start, self.stop)


class Sequences:
    """The sequence of each slot: its request, generated tokens and finish; None where there was none yet.

    A slot is *awaited* from the moment a pass over it starts until the token of that pass is recorded.
    """

    def __init__(self, slots: int):
        self.rows: list[WaveRow | None] = [None] * slots
        self.generated: list[list[int]] = [[] for _ in range(slots)]
        self.finish = [Finish.RUNNING] * slots
        self._awaited = [False] * slots

    def place(self, slot: int, row: WaveRow) -> None:
        """A request takes a slot."""
        self.rows[slot] = row
        self.generated[slot] = list(row.generated)
        self.finish[slot] = Finish.RUNNING

    def ended(self, slot: int) -> bool:
        return self.finish[slot] is not Finish.RUNNING

    def started(self, batch: Pass) -> None:
        """A pass was started; a token for each of its live slots is to come."""
        for slot in batch.live:
            self._awaited[slot] = True

    def awaited(self, slots: Iterable[int]) -> bool:
        return any(self._awaited[slot] for slot in slots)

    def record(self, batch: Pass, tokens: Sequence[int], finish: Sequence[int]) -> list[int]:
        """Takes one token for each slot of the pass; returns the slots whose sequence ended with it."""
        live, finished = set(batch.live), []
        for slot, token, code in zip(batch.slots, tokens, finish, strict=True):
            if slot not in live:
                continue
            self._awaited[slot] = False
            self.generated[slot].append(int(token))
            self.finish[slot] = Finish(int(code))
            if self.ended(slot):
                finished.append(slot)
        return finished

    def position(self, slot: int) -> int:
        """Where the slot's last token stands: after the prompt and the tokens generated before it."""
        return len(self.rows[slot].prompt) + len(self.generated[slot]) - 1


def prefill_micro_batches(prompt_tokens: Sequence[int], rows: int, tokens: int) -> list[MicroBatch]:
    """Cuts rows into prefill micro-batches of at most `rows` rows and `tokens` padded tokens (at least one row each).

    The bound on tokens keeps the workspace the plan reserved when prompts are longer than it expected.
    """
    batches: list[MicroBatch] = []
    start, longest = 0, 0
    for row, length in enumerate(prompt_tokens):
        longest = max(longest, length)
        size = row - start + 1
        if row > start and (size > rows or size * longest > tokens):
            batches.append(MicroBatch(start, row))
            start, longest = row, length
    if prompt_tokens:
        batches.append(MicroBatch(start, len(prompt_tokens)))
    return batches
