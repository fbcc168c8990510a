"""Knows which points of a sweep are done: their output exists, made from the same configuration and files.

A finished point has a point.json with a digest of its configuration (except `out`), of the version, and of the size and
time of every file that the configuration names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_llmpq import __version__
from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json

# what each command writes when it succeeds; other commands always run again
ARTEFACTS = {
    "plan": ("plan.json", "summary.json"),  # the latter of a front
    "run": ("metrics.json",),
    "evaluate": ("scores.json",),
    "sensitivity": ("sensitivity.json",),
    "simulate": ("metrics.json",),
    "quantize": ("quantized.json",),
    "profile": ("latency.json",),
}
_FILE = "point.json"


def digest(command: str, settings: Mapping[str, Any]) -> str:
    """`settings`: the resolved configuration as plain dicts and lists."""
    own = {key: value for key, value in settings.items() if key != "out"}
    record = {"command": command, "version": __version__, "settings": own, "files": sorted(set(_files(own)))}
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def is_done(out: Path, command: str, wanted: str) -> bool:
    """Whether `out` holds the command's artefact, made from the same configuration."""
    if not any((out / name).is_file() for name in ARTEFACTS.get(command, ())):
        return False
    try:
        noted = read_json(out / _FILE, "Note", "remove it")
    except UserError:
        return False
    return isinstance(noted, dict) and noted.get("digest") == wanted


def note_done(out: Path, command: str, made: str) -> None:
    """Notes that a point has succeeded."""
    if any((out / name).is_file() for name in ARTEFACTS.get(command, ())):
        (out / _FILE).write_text(json.dumps({"command": command, "digest": made}) + "\n", encoding="utf-8")


def forget(out: Path) -> None:
    """Removes the note before a point runs again, so that a killed attempt does not look finished."""
    (out / _FILE).unlink(missing_ok=True)


def _files(value: Any) -> Iterator[tuple[str, int, int]]:
    """(path, size, time) of every value that names an existing file."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _files(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _files(entry)
    elif isinstance(value, str) and value and len(value) < 4096 and "\n" not in value:
        path = Path(value)
        if path.is_file():
            status = path.stat()
            yield value, status.st_size, status.st_mtime_ns
