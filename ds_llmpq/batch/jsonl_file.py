"""An append-only file of JSON rows: whole rows or none, one writer, and repair of what a crash left."""

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
ROW_START = b'{"id": "batch_req_'  # how every row begins: a torn tail that does not was not written by this program

_OF_RESULTS, _OF_ERRORS = (
    f"that is no {kind} row: give another out=DIR or mend the line" for kind in ("result", "error")
)

Key: TypeAlias = "str | int"  # a custom_id; the line in the input of a row in which none can be read


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
    """One locked, append-only file. Every row is written whole and unbuffered, or taken back."""

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
        """Write one row at the end. UserError if it does not fit on the disk; the file is then as it was before."""
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
        """The custom_ids of all rows, after cutting off a last row without its line end. `UserError` for an id that
        stands there twice: this program never writes one so, and a choice between the two is the user's."""
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
        """Drop all rows. UserError if the file does not begin like a row file: it is not this program's to empty."""
        _check_ours(os.pread(self._descriptor, len(ROW_START), 0), self.path, 1)
        self.truncate(0)

    def truncate(self, end: int) -> None:
        os.ftruncate(self._descriptor, end)
        self._end = end

    def sync(self) -> None:
        """Make the rows survive a power cut. UserError if the disk cannot take them, or if they are gone already."""
        self._check_still_there()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._write_error(error) from None

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._descriptor < 0:
            return
        try:
            self._check_still_there()
            os.ftruncate(self._descriptor, self._end)  # a row whose writing an interrupt broke off
            self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_still_there(self) -> None:
        """`UserError` if somebody deleted, replaced or cut the file: what is written to it now, nobody will read."""
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
        """(line, whether it has its line end) from the start of the file."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for raw in read_lines(file, str(self.path), _OF_RESULTS):
                yield raw, raw.endswith(b"\n")


def encode_row(row: dict[str, Any]) -> bytes:
    """A row as it stands in the file, line end included."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # JSON allows these raw, but str.splitlines takes them for line ends
    for character, escape in UNICODE_LINE_ENDS:
        text = text.replace(character, escape)
    return text.encode("utf-8", errors="replace") + b"\n"


def check_folder(out_dir: str | Path) -> Path:
    """The output folder, made if it is missing. UserError if that cannot be, or if it may only be read."""
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
    """Make new files of a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def read_finished_ids(path: Path) -> set[str]:
    """custom_ids of a row file, repaired if its last row is torn; none if there is no such file."""
    if not path.exists():
        return set()
    file = RowFile(path, create=False)
    try:
        return file.repair()
    finally:
        file.close()


def read_error_keys(path: Path) -> Counter[Key]:
    """How often each row of the input stands in an error file; a torn last row does not count. Empty if there is no
    such file. `UserError`: another program's file."""
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
    """A torn row may be cut off; what this program never wrote may not. A power cut can leave zeros at the end."""
    text = start.rstrip(b"\0")
    if not (text.startswith(ROW_START) or ROW_START.startswith(text)):
        raise UserError(f"line {line} of {path} is not a result row; give another out=DIR or mend the line.")
