"""What every stage knows of the sequences in flight. Pure state: the same on all ranks, changed by the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Finish(IntEnum):
    """Why a sequence ended; travels with its last token."""

    RUNNING = 0
    STOP = 1  # an end-of-sequence token or a stop string
    LENGTH = 2  # max_tokens reached
    BROKEN = 3  # the model's logits were not numbers


@dataclass(frozen=True)
class MicroBatch:
    """Rows [start, stop) of the sequences in flight."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def rows(self) -> range:
        return range(self.start, self.stop)


class Sequences:
    """Prompt lengths, generated tokens and finish of each row.

    A row is *awaited* from the moment a pass over it starts until the token of that pass is recorded.
    """

    def __init__(self, prompt_tokens: Sequence[int]):
        self.prompt_tokens = list(prompt_tokens)
        self.generated: list[list[int]] = [[] for _ in prompt_tokens]
        self.finish = [Finish.RUNNING] * len(self.prompt_tokens)
        self._awaited = [False] * len(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def started(self, micro_batch: MicroBatch) -> None:
        """A pass over these rows was started; a token for each is to come."""
        for row in micro_batch.rows():
            self._awaited[row] = True

    def awaited(self, micro_batch: MicroBatch) -> bool:
        return any(self._awaited[row] for row in micro_batch.rows())

    def record(self, micro_batch: MicroBatch, tokens: Sequence[int], finish: Sequence[int]) -> list[int]:
        """Takes one token a row; returns the rows that finished with it. Rows finished earlier ignore theirs."""
        finished = []
        for row, token, code in zip(micro_batch.rows(), tokens, finish, strict=True):
            self._awaited[row] = False
            if self.finish[row] is not Finish.RUNNING:
                continue
            self.generated[row].append(int(token))
            self.finish[row] = Finish(int(code))
            if self.finish[row] is not Finish.RUNNING:
                finished.append(row)
        return finished

    def running(self, micro_batch: MicroBatch) -> bool:
        return any(self.finish[row] is Finish.RUNNING for row in micro_batch.rows())

    def last_tokens(self, micro_batch: MicroBatch) -> list[int]:
        """The token each row feeds into its next decode pass."""
        return [self.generated[row][-1] for row in micro_batch.rows()]

    def positions(self, micro_batch: MicroBatch) -> list[int]:
        """Where those tokens stand: after the prompt and the tokens generated before them."""
        return [self.prompt_tokens[row] + len(self.generated[row]) - 1 for row in micro_batch.rows()]


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


def decode_groups(sequences: int, rows: int) -> list[MicroBatch]:
    """Cuts rows into decode micro-batches of `rows` rows, the last one possibly smaller."""
    return [MicroBatch(start, min(start + rows, sequences)) for start in range(0, sequences, rows)]
