"""in_flight.jsonl: the tokens of unfinished sequences, so that they continue after a death where they were.

It is appended once per pass and not synced. So it survives the death of any process, but in a power cut its tail or all
of it may be lost, which costs nothing but the work. It is rewritten when most of it is about sequences that have ended,
so its size is bounded by what is in flight. Only `results.jsonl` says what is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import open_regular, read_lines
from ds_llmpq.launch.journal import fingerprint_plan, select_sampling
from ds_llmpq.plan import Plan
from ds_llmpq.validation import Digest, one_of, validate_line

NAME = "in_flight.jsonl"
SCHEMA = 1
_SLACK_BYTES = 1 << 20  # of ended sequences, before the file is rewritten
_TOKEN_BYTES = 24  # that the file may hold for each token in flight
_Number = Annotated[int, Ge(0), Lt(1 << 31)]


@dataclass(frozen=True)
class _Head:
    schema: one_of(SCHEMA)
    identity: Digest


@dataclass(frozen=True)
class _Tokens:
    """All tokens of one row, or the next one of each of several."""

    tokens: list[_Number]
    row: _Number | None = None
    rows: list[_Number] | None = None


def build_identity(input_sha256: str, plan: Plan, batch: BatchConfig) -> str:
    """A hash of what tokens depend on, like results: a run with another identity cannot use them."""
    decided = [input_sha256, fingerprint_plan(plan), select_sampling(batch)]
    return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()


class InFlight:
    """The file of one run, open for writing. Rows are named by their number in the input.

    `tokens`: the tokens in flight by row. Once a write fails, nothing more is kept, and the batch continues without it.
    """

    def __init__(self, folder: Path, identity: str, tokens: Mapping[int, Sequence[int]]):
        self.path = folder / NAME
        self.tokens = {row: array("i", of_row) for row, of_row in tokens.items()}
        self._identity = identity
        self._live = sum(map(len, self.tokens.values()))
        self._descriptor = -1
        self._bytes = 0
        self._attempt(self._rewrite)

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Keeps the next token of each row; these sequences continue after it."""
        for row, token in zip(rows, tokens, strict=True):
            self.tokens.setdefault(row, array("i")).append(token)
        self._live += len(rows)
        if rows:
            self._append(f'{{"rows": {list(rows)}, "tokens": {list(tokens)}}}\n')

    def end(self, row: int) -> None:
        """The row's result is written."""
        self._live -= len(self.tokens.pop(row, ()))

    def begin_anew(self, row: int) -> None:
        """Forgets the tokens of a row that was given up, so that it starts again."""
        if row in self.tokens:
            self.end(row)
            self._append(f'{{"row": {row}, "tokens": []}}\n')

    def close(self) -> None:
        """Removes the file if nothing is in flight."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not self.tokens:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _append(self, line: str) -> None:
        if self._descriptor < 0:
            return
        data = line.encode()
        self._attempt(lambda: self._write(data))
        if self._bytes > _SLACK_BYTES + _TOKEN_BYTES * self._live:
            self._attempt(self._rewrite)

    def _write(self, data: bytes) -> None:
        if os.write(self._descriptor, data) != len(data):
            raise OSError(0, "it does not fit")
        self._bytes += len(data)

    def _rewrite(self) -> None:
        """Replaces the file by one with only what is in flight."""
        whole = self.path.with_suffix(".tmp")
        lines = [json.dumps({"schema": SCHEMA, "identity": self._identity})]
        lines += (json.dumps({"row": row, "tokens": of_row.tolist()}) for row, of_row in self.tokens.items())
        data = "".join(f"{line}\n" for line in lines).encode()
        descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb", buffering=0, closefd=False) as file:
                if file.write(data) != len(data):
                    raise OSError(0, "it does not fit")
            os.replace(whole, self.path)
        except OSError:
            os.close(descriptor)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._bytes = descriptor, len(data)

    def _attempt(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
            for path in (self.path, self.path.with_suffix(".tmp")):  # a file torn in its middle is of no use
                with contextlib.suppress(OSError):
                    path.unlink()
            sys.stderr.write(
                f"ds-llmpq: cannot write {self.path} ({error.strerror}); after a death, rows in flight start again\n"
            )


def read_in_flight(folder: Path, identity: str) -> dict[int, list[int]]:
    """Tokens by row, as far as the file is whole; none if it is missing or has another identity."""
    path = folder / NAME
    found: dict[int, list[int]] = {}
    if path.is_symlink() or not path.exists():
        return found
    with contextlib.suppress(UserError, OSError), open_regular(path, "tokens in flight", "remove it") as file:
        for number, line in enumerate(read_lines(file, NAME, "remove it")):
            if not line.endswith(b"\n"):
                break
            if number == 0:
                if validate_line(_Head, line, NAME, "remove it").identity != identity:
                    break
            elif not _take(found, validate_line(_Tokens, line, NAME, "remove it")):
                break
    return {row: tokens for row, tokens in found.items() if tokens}


def _take(found: dict[int, list[int]], line: _Tokens) -> bool:
    """Adds a line's tokens to `found`. False: it names neither a row nor one for each token."""
    if line.row is not None:
        found[line.row] = line.tokens
        return True
    if line.rows is None or len(line.rows) != len(line.tokens):
        return False
    for row, token in zip(line.rows, line.tokens, strict=True):
        found.setdefault(row, []).append(token)
    return True
