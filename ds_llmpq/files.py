"""Small files written whole or not at all, and read with a bound on their size. Imports no room; importable by all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError

MOST_BYTES = 64 << 20
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def write_whole(path: str | Path, text: str | Iterable[str], mode: int = 0o666) -> None:
    """Replaces a file in one step: after a crash or power cut it holds the old text or the new one, never a part.

    `text`: all of it, or its parts in order. `mode` is what the umask is taken from. `UserError` where it cannot be
    written; the old file is then untouched.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}); make room or give another out=DIR.") from None


def write_json(path: str | Path, value: object) -> None:
    """`write_whole` of readable JSON."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, what: str, remedy: str, most_bytes: int = MOST_BYTES) -> Any:
    """Parsed JSON of a file that comes from elsewhere. `UserError`, with `remedy` as its end: missing, too large, not
    UTF-8, not JSON, or nested too deeply to parse. `what` names the kind of file in the message."""
    file = Path(path)
    try:
        if file.stat().st_size > most_bytes:
            raise UserError(f"{what} {file} has {file.stat().st_size} bytes, more than {most_bytes}; {remedy}.")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} {file} cannot be read ({reason}); {remedy}.") from None


def lock(descriptor: int, refusal: str) -> None:
    """Holds an open file or folder until it is closed; `UserError(refusal)` if somebody else does. File systems without
    locks are taken as they are."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:
        pass


@contextlib.contextmanager
def unwritable_as_mistake(folder: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written, wherever it is met, as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        file = error.filename or folder
        raise UserError(f"{file} cannot be written ({error.strerror}); make room or give another out=DIR.") from None
