"""An append-only file of JSON rows: only whole rows, a single writer, and repair after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ds_llmpq.errors import UserError
from ds_llmpq.files import lock, open_regular, read_lines
from ds_llmpq.validation import Positive, validate_line

UNICODE_LINE_ENDS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))
ROW_START = b'{"id": "batch_req_'  # every row begins so; a torn tail that does not was not written by this program

_OF_RESULTS, _OF_ERRORS = (
    f"that is no {kind} row: give another out=DIR or mend the line" for kind in ("result", "error")
)

Key: TypeAlias = "str | int"  # a custom_id, or the input line of a row without a readable one


@dataclass(frozen=True)
class _ResultRow:
    custom_id: str
    response: dict[str, Any]


@dataclass(frozen=True)
class _Reason:
    line: Positive


@dataclass(frozen=True)
class _ErrorRow:
    custom_id: str | None
    error: _Reason


class RowFile:
    """A locked, append-only file. Every row is written whole and unbuffered, or removed again."""

    def __init__(self, path: Path, *, create: bool = True):
        self.path = path
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give a writable folder as out=DIR.") from None
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise UserError(f"cannot write {path}: it is no regular file; give another out=DIR.")
            lock(self._descriptor, f"{path} is being written by another run; wait for it or give another out=DIR.")
            self._end = os.lseek(self._descriptor, 0, os.SEEK_END)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, row: dict[str, Any]) -> None:
        """Writes a row at the end. `UserError`: it does not fit on the disk; the file is then unchanged."""
        data = encode_row(row)
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self._end + written)
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            raise self._write_error(error) from None
        self._end += len(data)

    def repair(self) -> set[str]:
        """The custom_ids of all rows, after cutting off a last row without a line end. `UserError`: an id occurs twice,
        which this program never writes, so the user must choose."""
        found: set[str] = set()
        end = 0
        for line, (raw, whole) in enumerate(self._lines(), start=1):
            if not whole:
                _check_ours(raw, self.path, line)
                break
            custom_id = validate_line(_ResultRow, raw, f"line {line} of {self.path}", _OF_RESULTS).custom_id
            if custom_id in found:
                raise UserError(f"line {line} of {self.path} repeats custom_id {custom_id!r}; remove one of the two.")
            found.add(custom_id)
            end += len(raw)
        if end < self._end:
            self.truncate(end)
        return found

    def clear(self) -> None:
        """Drops all rows. `UserError`: the file does not begin like a row file, so this program must not empty it."""
        _check_ours(os.pread(self._descriptor, len(ROW_START), 0), self.path, 1)
        self.truncate(0)

    def truncate(self, end: int) -> None:
        os.ftruncate(self._descriptor, end)
        self._end = end

    def sync(self) -> None:
        """Makes the rows survive a power cut. `UserError`: the disk fails, or the rows are already gone."""
        self._check_still_there()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._write_error(error) from None

    def close(self) -> None:
        """Syncs and closes; a second call does nothing."""
        if self._descriptor < 0:
            return
        try:
            self._check_still_there()
            os.ftruncate(self._descriptor, self._end)  # cuts off a row whose writing was interrupted
            self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_still_there(self) -> None:
        """`UserError` if somebody deleted, replaced or cut the file: further rows would be lost."""
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(own, there) or own.st_size < self._end:
            raise UserError(
                f"{self.path} was deleted, replaced or cut while it was being written, and rows are gone with it; the "
                "same command serves what is missing."
            )

    def _write_error(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror}; its rows so far are whole, free some space and run again."
        )

    def _lines(self) -> Iterator[tuple[bytes, bool]]:
        """(line, whether it has a line end) from the start of the file."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for raw in read_lines(file, str(self.path), _OF_RESULTS):
                yield raw, raw.endswith(b"\n")


def encode_row(row: dict[str, Any]) -> bytes:
    """A row as in the file, with its line end."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # JSON allows these, but str.splitlines treats them as line ends
    for character, escape in UNICODE_LINE_ENDS:
        text = text.replace(character, escape)
    return text.encode("utf-8", errors="replace") + b"\n"


def check_folder(out_dir: str | Path) -> Path:
    """The output folder, created if it is missing. `UserError`: it cannot be created or is read-only."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write to {folder}: it is not a folder; give another out=DIR.") from None
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; give a writable folder as out=DIR.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}; give a writable folder as out=DIR.")
    return folder


def sync_folder(folder: Path) -> None:
    """Makes new files of a folder survive a power cut, if the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def read_error_keys(path: Path) -> Counter[Key]:
    """How often each input row occurs in an error file; a torn last row does not count. Empty if the file is missing.
    `UserError`: another program's file."""
    found: Counter[Key] = Counter()
    if not os.path.lexists(path):
        return found
    with open_regular(path, "error file", "give another out=DIR") as file:
        for number, raw in enumerate(read_lines(file, str(path), _OF_ERRORS), start=1):
            if raw.endswith(b"\n"):
                row = validate_line(_ErrorRow, raw, f"line {number} of {path}", _OF_ERRORS)
                found[row.error.line if row.custom_id is None else row.custom_id] += 1
    return found


def _check_ours(start: bytes, path: Path, line: int) -> None:
    """`UserError` unless this program may have written the row. A power cut can leave zeros at the end."""
    text = start.rstrip(b"\0")
    if not (text.startswith(ROW_START) or ROW_START.startswith(text)):
        raise UserError(f"line {line} of {path} is not a result row; give another out=DIR or mend the line.")
