"""Recognizes files of other formats given as a batch file, by their first and last bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from ds_llmpq.errors import UserError

_LOOKED_AT = 4096
# first bytes, format, and how to turn it into a batch file
_BEGINNINGS = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it (unzstd)"),
    (b"BZh", "compressed by bzip2", "unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it (unxz)"),
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"PAR1", "a parquet table", "write its rows as JSON lines"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)
_HALF_EMPTY = (b"{\x00", b"\x00{", b"[\x00", b"\x00[")  # UTF-16 without its mark


def refuse_other_formats(file: BinaryIO, path: str | Path) -> None:
    """`UserError` for a file that cannot hold one JSON object per line; otherwise rewinds it."""
    start = file.read(_LOOKED_AT)
    for beginning, name, remedy in _BEGINNINGS:
        if start.startswith(beginning) and not _is_row(start):
            raise UserError(f"input {path} is {name}, not a batch file; {remedy} and give that as input=FILE.")
    if start.startswith(_HALF_EMPTY):
        raise UserError(
            f"input {path} is UTF-16 text, not a batch file; save it as UTF-8 (iconv -f UTF-16LE -t UTF-8)."
        )
    # a first row may begin with a bracket by mistake, but an array also ends with one
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and _end(file).rstrip().endswith(b"]"):
        raise UserError(f"input {path} is one JSON array, not a batch file; write one object per line (jq -c '.[]').")
    file.seek(0)


def _is_row(start: bytes) -> bool:
    """Whether this is a line whose first bytes were damaged into UTF-16's mark."""
    return start.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\x00" not in start


def _end(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LOOKED_AT))
    return file.read()
