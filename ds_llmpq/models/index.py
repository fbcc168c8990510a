"""Reads the index and the shard headers of a safetensors checkpoint. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from annotated_types import MaxLen

from ds_llmpq.errors import UserError
from ds_llmpq.files import parse_json, read_json
from ds_llmpq.validation import Count, Many, Name, validate

REMEDY = "fetch the checkpoint again"
MOST_HEADER_BYTES = 100 << 20  # safetensors' own limit
_Names = Annotated[dict[Name, Name], MaxLen(1_000_000)]  # a mixture of experts has many tensors


@dataclass(frozen=True)
class _Index:
    weight_map: _Names


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in its file: dtype as safetensors names it, shape, and byte offsets [start, stop) from the end of the
    header."""

    dtype: Name
    shape: Many[Count]
    data_offsets: tuple[Count, Count]


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name within the index's folder. `UserError`: no safetensors index, or it names files in other
    folders, which an untrusted checkpoint may not."""
    what = "Safetensors index"
    found = validate(_Index, read_json(index, what, REMEDY), f"{what} {index}", REMEDY, ignore_unknown=True).weight_map
    for shard in set(found.values()):
        if Path(shard).name != shard or len(shard) > 255:
            raise UserError(f"{index} names the shard {shard[:80]!r}; shards must lie in the checkpoint's folder.")
    return found


def read_header(file: BinaryIO, where: str) -> tuple[dict[str, Any], int]:
    """(tensor name -> entry, offset of the tensors' bytes) from an open safetensors file. `UserError`: no such
    header."""
    size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER_BYTES:
        raise UserError(f"{where} has a header of {size} bytes, more than {MOST_HEADER_BYTES}; {REMEDY}.")
    tensors = validate(dict[str, Any], parse_json(file.read(size), where, REMEDY), where, REMEDY)
    return {name: entry for name, entry in tensors.items() if name != "__metadata__"}, 8 + size


def find_tensor(tensors: dict[str, Any], name: str, where: str) -> StoredTensor:
    """The header's entry for one tensor. `UserError`: it is missing or invalid."""
    found = validate(StoredTensor, tensors.get(name), f"{where}: {name}", REMEDY)
    if found.data_offsets[0] > found.data_offsets[1]:
        raise UserError(f"{where} ends the tensor {name} before its first byte; {REMEDY}.")
    return found
