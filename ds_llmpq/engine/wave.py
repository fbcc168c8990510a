"""A wave: requests that the driver hands to every stage together."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from ds_llmpq.engine.sampling import GREEDY, RowSampling


@dataclass(frozen=True)
class WaveRow:
    """One request as the engine sees it; `key` is the driver's own name for it.

    `generated`: tokens it has already, from an earlier admission that its slot was too short for.
    """

    key: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: RowSampling = GREEDY
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    generated: tuple[int, ...] = ()

    @property
    def known(self) -> tuple[int, ...]:
        """The tokens that prefill runs over."""
        return self.prompt + self.generated

    @property
    def positions(self) -> int:
        """Cache positions it needs at most; its last token's is never read."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Wave:
    """`slots` (0: one a row) of `capacity` cache positions (0: as many as the longest row needs) that the rows pass
    through. A wave that `joins` follows one of the same shape without a gap, its rows taking slots as they become free;
    else it starts when the wave before has ended. `live`: requests may come at any time, so the driver is asked when a
    slot is free; a wave without rows then means that none has come.
    """

    rows: tuple[WaveRow, ...]
    slots: int = 0
    capacity: int = 0
    joins: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", self.slots or len(self.rows))
        longest = max((row.positions for row in self.rows), default=0)
        object.__setattr__(self, "capacity", self.capacity or longest)

    @property
    def shape(self) -> tuple[int, int]:
        return self.slots, self.capacity

    def to_bytes(self) -> bytes:
        """A JSON header's length, the header, then all prompts as 32-bit integers."""
        rows = [asdict(row) | {"prompt": len(row.prompt)} for row in self.rows]
        fields = {"rows": rows, "slots": self.slots, "capacity": self.capacity, "joins": self.joins}
        fields["live"] = self.live
        header = json.dumps(fields).encode()
        prompts = np.array([token for row in self.rows for token in row.prompt], dtype="<i4")
        return len(header).to_bytes(8, "little") + header + prompts.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Wave:
        end = 8 + int.from_bytes(data[:8], "little")
        wave = json.loads(data[8:end])
        prompts = np.frombuffer(data[end:], dtype="<i4").tolist()
        rows, start = [], 0
        for fields in wave["rows"]:
            stop = start + fields["prompt"]
            fields["prompt"] = tuple(prompts[start:stop])
            fields["sampling"] = RowSampling(**fields["sampling"])
            fields["stop"], fields["generated"] = tuple(fields["stop"]), tuple(fields["generated"])
            rows.append(WaveRow(**fields))
            start = stop
        return cls(tuple(rows), wave["slots"], wave["capacity"], wave["joins"], wave["live"])
