"""Rows to score and their scores, as plain data that travels between ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class ScoredRow:
    """`prompt` is fed in; `targets` are what its last positions shall predict (the next token at each of them).

    `offset`: number of targets in all rows before, the row's place in the file of reference distributions; None: the
    row is not compared with a reference.
    """

    prompt: tuple[int, ...]
    targets: tuple[int, ...]
    offset: int | None = None

    @classmethod
    def of(cls, tokens: list[int], scored: int | None = None, offset: int | None = None) -> ScoredRow:
        """The row that scores the last `scored` of `tokens` (None: all but the first)."""
        count = len(tokens) - 1 if scored is None else scored
        return cls(tuple(tokens[:-1]), tuple(tokens[len(tokens) - count :]), offset)


@dataclass(frozen=True)
class RowBatch:
    """Rows that go through the pipeline together."""

    rows: tuple[ScoredRow, ...]

    def to_bytes(self) -> bytes:
        """A JSON header's length, the header, then all tokens as 32-bit integers."""
        header = json.dumps([[len(row.prompt), len(row.targets), row.offset] for row in self.rows]).encode()
        tokens = np.array([token for row in self.rows for token in row.prompt + row.targets], dtype="<i4")
        return len(header).to_bytes(8, "little") + header + tokens.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> RowBatch:
        end = 8 + int.from_bytes(data[:8], "little")
        tokens = tuple(np.frombuffer(data[end:], dtype="<i4").tolist())
        rows, start = [], 0
        for prompt, targets, offset in json.loads(data[8:end]):
            middle = start + prompt
            rows.append(ScoredRow(tokens[start:middle], tokens[middle : middle + targets], offset))
            start = middle + targets
        return cls(tuple(rows))


@dataclass(frozen=True)
class RowScore:
    """Of one row: log-probability of each target in nats, whether it was the most likely token; and, against the
    reference, the summed KL(reference || model) and at how many positions both find the same token most likely."""

    logprobs: list[float]
    greedy: list[bool]
    kl: float | None = None
    agree: int | None = None

    def to_json(self) -> dict:
        return asdict(self)
