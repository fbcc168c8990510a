"""Fields of configuration dataclasses that the command line treats specially."""

from __future__ import annotations

from dataclasses import field
from typing import Any

_PATH = "path"


def path_field(default: str | None = None) -> Any:
    """A dataclass field for a file or folder, which the command line takes literally, whatever it means in Hydra's
    grammar."""
    return field(default=default, metadata={_PATH: True})


def is_path(metadata: Any) -> bool:
    """Whether a field's metadata are those of a `path_field`."""
    return bool(metadata.get(_PATH))
