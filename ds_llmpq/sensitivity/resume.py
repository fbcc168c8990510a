"""Saves the progress of a sensitivity run, so that a killed one resumes with the same model, text and settings."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json
from ds_llmpq.validation import Number, Plain, TableByNumber, validate

_SECONDS_BETWEEN_STATES = 30.0  # hidden states are large; rows are not


@dataclass(frozen=True)
class _ProgressFile:
    """progress.json: rows of layers from the first on, or by layer."""

    identity: Plain = field(default_factory=dict)
    rows: list[list[Number]] = field(default_factory=list)
    by_layer: TableByNumber[list[Number]] = field(default_factory=dict)


class Progress:
    """Keeps the rows of a table, and the hidden states after the last of them, in `folder`.

    `identity` is everything that the rows depend on; what a run with another identity left is ignored.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.identity = json.loads(json.dumps(identity))
        self._rows_file = folder / "progress.json"
        self._state_file = folder / "progress.safetensors"
        self._stored = time.monotonic()

    def resume(self, first: Callable[[], torch.Tensor]) -> tuple[list[list[float]], torch.Tensor]:
        """(finished rows, hidden states after them); `first` gives the states if nothing is finished."""
        found, start = self._read(), first()
        with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            state = load_file(self._state_file)
            rows, hidden = found.rows[: int(state["layers"])], state["hidden"]
            if len(rows) == int(state["layers"]) and (hidden.shape, hidden.dtype) == (start.shape, start.dtype):
                return rows, hidden
        return [], start

    def keep(self, rows: list[list[float]], hidden: torch.Tensor) -> None:
        """Keeps the rows with their states from time to time; a restart begins at the last ones kept."""
        if time.monotonic() - self._stored < _SECONDS_BETWEEN_STATES:
            return
        self._stored = time.monotonic()
        unfinished = self._state_file.with_name("progress.state.part")
        save_file({"hidden": hidden.contiguous(), "layers": torch.tensor(len(rows))}, unfinished)
        self._write({"rows": rows})
        os.replace(unfinished, self._state_file)

    def read_rows(self) -> dict[int, list[float]]:
        return self._read().by_layer

    def keep_rows(self, by_layer: dict[int, list[float]]) -> None:
        self._write({"by_layer": by_layer})

    def clear(self) -> None:
        for file in (self._rows_file, self._state_file):
            file.unlink(missing_ok=True)

    def _read(self) -> _ProgressFile:
        with contextlib.suppress(UserError):
            found = validate(_ProgressFile, read_json(self._rows_file, "Progress", ""), "Progress", "")
            if found.identity == self.identity:
                return found
        return _ProgressFile()

    def _write(self, fields: dict[str, Any]) -> None:
        unfinished = self._rows_file.with_name("progress.rows.part")
        unfinished.write_text(json.dumps({"identity": self.identity, **fields}))
        os.replace(unfinished, self._rows_file)
