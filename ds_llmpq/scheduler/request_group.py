"""A sequence, and a request group: sequences that the driver hands to every stage together, as one message.

A message is plain data as JSON, then lists of token ids as 32-bit integers. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections import abc
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams


@dataclass(frozen=True)
class Sequence:
    """One request as the engine sees it; `key` is the driver's own name for it.

    `generated`: tokens it has already, from an earlier admission that its slot was too short for. `targets`: where a
    stage scores instead of choosing tokens, what the prompt's last positions shall predict, one target a position.
    """

    key: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = GREEDY
    generated: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()

    @property
    def prefill_tokens(self) -> tuple[int, ...]:
        """The tokens that prefill runs over: the prompt, and what was generated before."""
        return self.prompt + self.generated

    @property
    def max_kv_tokens(self) -> int:
        """Positions of the KV cache it needs at most; its last token's is never read."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class RequestGroup:
    """`slots` (0: one a sequence) of `capacity` cache positions (0: as many as the longest needs) that the sequences
    pass through. A group that `joins` follows one of the same shape without a gap, its sequences taking slots as they
    become free; else it starts when the group before has ended. `live`: requests may come at any time, so the driver is
    asked when a slot is free; a group without sequences then means that none has come.
    """

    sequences: tuple[Sequence, ...]
    slots: int = 0
    capacity: int = 0
    joins: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", self.slots or len(self.sequences))
        longest = max((each.max_kv_tokens for each in self.sequences), default=0)
        object.__setattr__(self, "capacity", self.capacity or longest)

    @property
    def shape(self) -> tuple[int, int]:
        return self.slots, self.capacity

    def to_bytes(self) -> bytes:
        rows = [[each.key, each.max_tokens, asdict(each.sampling)] for each in self.sequences]
        shape = {"slots": self.slots, "capacity": self.capacity, "joins": self.joins, "live": self.live}
        tokens = chain.from_iterable((each.prompt, each.generated, each.targets) for each in self.sequences)
        return pack_message([rows, shape], tokens)

    @classmethod
    def from_bytes(cls, data: bytes) -> RequestGroup:
        """`ValueError` or `TypeError` for bytes that `to_bytes` has not made."""
        (rows, shape), tokens = unpack_message(data)
        sequences = tuple(
            Sequence(key, prompt, most, SamplingParams(**sampling | {"stop": tuple(sampling["stop"])}), *further)
            for (key, most, sampling), prompt, *further in zip(
                rows, tokens[::3], tokens[1::3], tokens[2::3], strict=True
            )
        )
        return cls(sequences, **shape)


_MOST_BYTES = 1 << 31


def pack_message(fields: Any, tokens: abc.Iterable[abc.Sequence[int]]) -> bytes:
    """A header's length (8 bytes), the header [fields, lengths of the lists], the lists one behind another."""
    lists = list(tokens)
    header = json.dumps([fields, list(map(len, lists))]).encode()
    body = np.fromiter(chain.from_iterable(lists), "<i4", sum(map(len, lists)))
    return len(header).to_bytes(8, "little") + header + body.tobytes()


def unpack_message(data: bytes) -> tuple[Any, list[tuple[int, ...]]]:
    """The fields and the lists of tokens; `ValueError` for bytes that `pack_message` has not made."""
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 < end <= len(data) <= _MOST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes, with a header of {end - 8}")
    fields, lengths = json.loads(data[8:end])
    values = np.frombuffer(data, "<i4", offset=end).tolist()
    stops = list(accumulate(lengths, initial=0))
    if any(type(length) is not int or length < 0 for length in lengths) or stops[-1] != len(values):
        raise ValueError(f"a message of {len(values)} tokens, but its header counts {stops[-1]}")
    return fields, [tuple(values[start:stop]) for start, stop in pairwise(stops)]
