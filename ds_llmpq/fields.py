"""Fields of configuration dataclasses that the command line must know something about."""

from __future__ import annotations

from dataclasses import field
from typing import Any

_PATH = "path"


def path_field(default: str | None = None) -> Any:
    """A dataclass field whose value is a file or folder: the command line takes it as it is written, whatever Hydra's
    grammar would make of it."""
    return field(default=default, metadata={_PATH: True})


def is_path(metadata: Any) -> bool:
    """Whether a field's metadata are those of a `path_field`."""
    return bool(metadata.get(_PATH))
