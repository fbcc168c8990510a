"""An append-only file of JSON rows: whole rows or none, one writer, and repair of what a crash left."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ds_llmpq.errors import UserError
from ds_llmpq.files import lock

UNICODE_LINE_ENDS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))
ROW_START = b'{"id": "batch_req_'  # how every row begins: a torn tail that does not was not written by this program

Key: TypeAlias = "str | int"  # a custom_id; the line in the input of a row in which none can be read


class RowFile:
    """One locked, append-only file. Every row is written whole and unbuffered, or taken back."""

    def __init__(self, path: Path, *, create: bool = True):
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give a writable folder as out=DIR.") from None
        try:
            lock(self._descriptor, f"{path} is being written by another run; wait for it or give another out=DIR.")
            self._end = os.lseek(self._descriptor, 0, os.SEEK_END)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, row: dict[str, Any]) -> None:
        """Write one row at the end. UserError if it does not fit on the disk; the file is then as it was before."""
        data = row_bytes(row)
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self._end + written)
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            raise self._full(error) from None
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
            custom_id = _custom_id(raw, self.path, line)
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
            raise self._full(error) from None

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

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror}; its rows so far are whole, free some space and run again."
        )

    def _lines(self) -> Iterator[tuple[bytes, bool]]:
        """(line, whether it has its line end) from the start of the file."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for raw in file:
                yield raw, raw.endswith(b"\n")


def row_bytes(row: dict[str, Any]) -> bytes:
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


def finished_ids(path: Path) -> set[str]:
    """custom_ids of a row file, repaired if its last row is torn; none if there is no such file."""
    if not path.exists():
        return set()
    file = RowFile(path, create=False)
    try:
        return file.repair()
    finally:
        file.close()


def error_keys(path: Path) -> Counter[Key]:
    """How often each row of the input stands in an error file; a torn last row does not count. Empty if there is no
    such file. `UserError`: another program's file."""
    found: Counter[Key] = Counter()
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.endswith(b"\n"):
                    found[_error_key(raw, path, line)] += 1
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give another out=DIR.") from None
    return found


def _error_key(raw: bytes, path: Path, line: int) -> Key:
    try:
        row = json.loads(raw)
        key = row["error"]["line"] if row["custom_id"] is None else row["custom_id"]
        if isinstance(key, (str, int)):
            return key
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"line {line} of {path} is not an error row; give another out=DIR or mend the line.")


def _custom_id(raw: bytes, path: Path, line: int) -> str:
    try:
        row = json.loads(raw)
        if isinstance(row["custom_id"], str) and isinstance(row["response"], dict):
            return row["custom_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"line {line} of {path} is not a result row; give another out=DIR or mend the line.")


def _check_ours(start: bytes, path: Path, line: int) -> None:
    """A torn row may be cut off; what this program never wrote may not. A power cut can leave zeros at the end."""
    text = start.rstrip(b"\0")
    if not (text.startswith(ROW_START) or ROW_START.startswith(text)):
        raise UserError(f"line {line} of {path} is not a result row; give another out=DIR or mend the line.")
