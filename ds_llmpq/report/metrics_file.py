"""Reads metrics.json, scores.json and the like for reports, and makes their texts printable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.files import read_json

REMEDY = "give the folder of a finished run"
_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def read_metrics(file: Path) -> dict[str, Any] | None:
    """The object in a file, with printable texts; None if the file is missing. `UserError`: no object, or as in
    `read_json`."""
    if not file.exists():
        return None
    record = read_json(file, "file", REMEDY)
    if not isinstance(record, dict):
        raise UserError(f"{file} holds no JSON object; {REMEDY}.")
    return _printable(record)


def look_up(record: dict[str, Any] | None, *names: str) -> float | None:
    """The number under nested keys; None if there is none."""
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


@contextmanager
def refuse_other_forms(file: Path) -> Iterator[None]:
    """Turns an exception in the block into a `UserError`: `file` does not have the keys and values of this version."""
    try:
        yield
    except _WRONG as error:
        reason = make_printable(f"{type(error).__name__}: {error}", 200, keep="")
        raise UserError(f"{file} is not of the form that this version reads ({reason}); run again with it.") from None


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {make_printable(key, 1_000, keep=""): _printable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    return make_printable(value, 10_000, keep="\n") if isinstance(value, str) else value
