"""What every stage knows of the sequences in flight. Pure state: the same on all ranks, changed by the same tokens."""

from __future__ import annotations

from collections import abc
from enum import IntEnum

from ds_llmpq.scheduler.micro_batch import MicroBatch
from ds_llmpq.scheduler.request_group import Sequence


class Finish(IntEnum):
    """Why a sequence left its slot; travels with its last token."""

    RUNNING = 0
    STOP = 1  # an end-of-sequence token or a stop string
    LENGTH = 2  # max_tokens reached
    NAN_LOGITS = 3  # the model's logits were not numbers, or a stage could not run the row
    PREEMPTED = 4  # its slot is full and it has not ended: to be admitted again with more room


class SlotTable:
    """The sequence of each slot, its generated tokens and its finish; None where there was none yet. `shared`: how many
    of the sequence's tokens are a prefix that is stored apart and takes no room in the slot.

    A slot is *awaited* from the moment a micro-batch with it starts until its token is recorded.
    """

    def __init__(self, slots: int):
        self.sequences: list[Sequence | None] = [None] * slots
        self.generated: list[list[int]] = [[] for _ in range(slots)]
        self.finish = [Finish.RUNNING] * slots
        self.shared = [0] * slots
        self._awaited = [False] * slots

    def admit(self, slot: int, sequence: Sequence, shared: int = 0) -> None:
        """The sequence takes the slot."""
        self.sequences[slot] = sequence
        self.shared[slot] = shared
        self.generated[slot] = list(sequence.generated)
        self.finish[slot] = Finish.RUNNING

    def has_ended(self, slot: int) -> bool:
        return self.finish[slot] is not Finish.RUNNING

    def start(self, batch: MicroBatch) -> None:
        """The micro-batch is under way; a token for each of its live slots is to come."""
        for slot in batch.live:
            self._awaited[slot] = True

    def are_awaited(self, slots: abc.Iterable[int]) -> bool:
        """Whether the token of any of them is still to come."""
        return any(self._awaited[slot] for slot in slots)

    def record(self, batch: MicroBatch, tokens: abc.Sequence[int], finish: abc.Sequence[int]) -> list[int]:
        """Takes one token for each slot of the micro-batch; returns the slots whose sequence ended with it."""
        live, ended = set(batch.live), []
        for slot, token, code in zip(batch.slots, tokens, finish, strict=True):
            if slot not in live:
                continue
            self._awaited[slot] = False
            self.generated[slot].append(int(token))
            self.finish[slot] = Finish(int(code))
            if self.has_ended(slot):
                ended.append(slot)
        return ended

    def is_full(self, slot: int, generated: int, capacity: int) -> bool:
        """Whether a slot of `capacity` positions has no room for a token behind so many generated ones."""
        return len(self.sequences[slot].prompt) + generated - self.shared[slot] >= capacity

    def position(self, slot: int) -> int:
        """Where the slot's last token stands: after the prompt and the tokens generated before it."""
        return len(self.sequences[slot].prompt) + len(self.generated[slot]) - 1
