"""Identity of a checkpoint, so that a plan or table made for one is never used with another."""

from __future__ import annotations

import hashlib
from pathlib import Path

_MOST_HEADER_BYTES = 100 << 20  # safetensors' own limit


def fingerprint(path: str | Path) -> str:
    """SHA-256 over config.json and the sizes and headers (names, types, shapes, offsets) of the safetensors files.

    Equal for byte-wise copies, read in milliseconds whatever the size; blind to weights that changed under an unchanged
    layout. Raises OSError for a folder without config.json.
    """
    folder = Path(path)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, _MOST_HEADER_BYTES)))
    return digest.hexdigest()
