"""Messages between ranks: plain data as JSON, then lists of token ids as 32-bit integers. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

_MOST_BYTES = 1 << 31


def pack(fields: Any, tokens: Iterable[Sequence[int]]) -> bytes:
    """A header's length (8 bytes), the header [fields, lengths of the lists], the lists one behind another."""
    lists = list(tokens)
    header = json.dumps([fields, list(map(len, lists))]).encode()
    body = np.fromiter(chain.from_iterable(lists), "<i4", sum(map(len, lists)))
    return len(header).to_bytes(8, "little") + header + body.tobytes()


def unpack(data: bytes) -> tuple[Any, list[tuple[int, ...]]]:
    """The fields and the lists of tokens; `ValueError` for bytes that `pack` has not made."""
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 < end <= len(data) <= _MOST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes, with a header of {end - 8}")
    fields, lengths = json.loads(data[8:end])
    values = np.frombuffer(data, "<i4", offset=end).tolist()
    stops = list(accumulate(lengths, initial=0))
    if any(type(length) is not int or length < 0 for length in lengths) or stops[-1] != len(values):
        raise ValueError(f"a message of {len(values)} tokens, but its header counts {stops[-1]}")
    return fields, [tuple(values[start:stop]) for start, stop in pairwise(stops)]
