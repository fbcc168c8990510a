"""Counts from the files what is done of a batch. Nothing else decides whether a run is finished.

Exit codes and metrics.json do not count: launchers end with code 0 when their child was killed, and files may be
deleted while they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_llmpq.batch.jsonl_file import Key, read_error_keys
from ds_llmpq.batch.reader import RequestFile
from ds_llmpq.batch.results import ERRORS_NAME, read_finished


@dataclass(frozen=True)
class Tally:
    """Rows of the input: in all, with a result, with an error. `lacking`: rows that are not in results.jsonl
    or errors.jsonl exactly once."""

    total: int
    completed: int
    failed: int
    lacking: int

    @property
    def complete(self) -> bool:
        return not self.lacking

    @property
    def counts(self) -> dict[str, int]:
        return {"total": self.total, "completed": self.completed, "failed": self.failed}


@dataclass(frozen=True)
class InputRows:
    """What is kept of a checked input: its hash, and the key of each row in the output (its custom_id, or its line
    if it has none)."""

    sha256: str
    keys: tuple[Key, ...]

    @classmethod
    def from_file(cls, file: RequestFile) -> InputRows:
        bad = (error.line if error.custom_id is None else error.custom_id for error in file.errors)
        return cls(file.sha256, (*(request.custom_id for request in file.requests), *bad))

    def count(self, folder: Path) -> Tally:
        """Reads both files of a folder. A torn last row of results.jsonl is cut off. `UserError`: a file holds
        something else, or a running batch is writing it."""
        results, errors = read_finished(folder), read_error_keys(folder / ERRORS_NAME)
        completed = failed = lacking = 0
        for key in self.keys:
            completed += key in results
            failed += errors[key] > 0 and key not in results
            lacking += errors[key] + (key in results) != 1
        return Tally(len(self.keys), completed, failed, lacking)
