"""Rows to score and their scores, as plain data that travels between ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain

from ds_llmpq.scheduler import message


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
        tokens = chain.from_iterable((row.prompt, row.targets) for row in self.rows)
        return message.pack([row.offset for row in self.rows], tokens)

    @classmethod
    def from_bytes(cls, data: bytes) -> RowBatch:
        """`ValueError` for bytes that `to_bytes` has not made."""
        offsets, tokens = message.unpack(data)
        return cls(tuple(map(ScoredRow, tokens[::2], tokens[1::2], offsets)))


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
