"""Identity of a checkpoint, so that a plan or table made for one is never used with another.

A quantized checkpoint carries the identity of the one it was made from: it is that model, kept otherwise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ds_llmpq.files import check_files

_MOST_HEADER_BYTES = 100 << 20  # safetensors' own limit


def fingerprint(path: str | Path) -> str:
    """SHA-256 over config.json and the sizes and headers (names, types, shapes, offsets) of the safetensors files.

    Equal for byte-wise copies, read in milliseconds whatever the size; blind to weights that changed under an unchanged
    layout. Raises OSError for a folder without config.json; `UserError` where something else is in the place of a file.
    """
    folder = Path(path)
    check_files(folder, "Checkpoint file", "fetch the checkpoint again")
    config = (folder / "config.json").read_bytes()
    if source := _source(config):
        return source
    digest = hashlib.sha256(config)
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, _MOST_HEADER_BYTES)))
    return digest.hexdigest()


def _source(config: bytes) -> str | None:
    """What `ds-llmpq quantize` noted of the checkpoint it read."""
    try:
        return json.loads(config)["quantization_config"]["source_fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
