"""A wave: the sequences that are in flight together, as the driver hands them to every stage."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from ds_llmpq.engine.sampling import GREEDY, RowSampling


@dataclass(frozen=True)
class WaveRow:
    """One request as the engine sees it; `key` is the driver's own name for it."""

    key: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: RowSampling = GREEDY
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def slots(self) -> int:
        """Cache positions it needs. A finished row goes along until its group ends, so its last token has one too."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Wave:
    rows: tuple[WaveRow, ...]

    @property
    def capacity(self) -> int:
        """Cache positions of every row: as many as the longest needs."""
        return max(row.slots for row in self.rows)

    def to_bytes(self) -> bytes:
        """A JSON header's length, the header, then all prompts as 32-bit integers."""
        fields = [asdict(row) | {"prompt": len(row.prompt)} for row in self.rows]
        header = json.dumps(fields).encode()
        prompts = np.array([token for row in self.rows for token in row.prompt], dtype="<i4")
        return len(header).to_bytes(8, "little") + header + prompts.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Wave:
        end = 8 + int.from_bytes(data[:8], "little")
        prompts = np.frombuffer(data[end:], dtype="<i4").tolist()
        rows, start = [], 0
        for fields in json.loads(data[8:end]):
            stop = start + fields["prompt"]
            fields["prompt"] = tuple(prompts[start:stop])
            fields["sampling"] = RowSampling(**fields["sampling"])
            fields["stop"] = tuple(fields["stop"])
            rows.append(WaveRow(**fields))
            start = stop
        return cls(tuple(rows))
