"""Writes small files whole or not at all, and reads files from outside with bounds. Imports no other package.

Files may come from anyone: only regular files are opened; sizes, nesting, digits and lengths are bounded; and every
problem is a `UserError` of one sentence. `ds_llmpq.validation` checks the values.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ds_llmpq.errors import UserError, first_line, make_printable, quote

MOST_BYTES = 64 << 20
_MOST_LINES_BYTES = 1 << 30  # of a file of JSON lines
# files that transformers, safetensors and tokenizers look for
CHECKPOINT_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model")
MOST_DEPTH = 64  # of nested objects and lists
MOST_VALUES, _MOST_YAML_BYTES = 200_000, 4 << 20  # of a YAML file
MOST_DIGITS = 300  # of a whole number; longer ones are no floats, and slow to read
_FORMULA = tuple("=+-@")
_NUMBER = re.compile(r"[+-]?[0-9]+([.][0-9]*)?([eE][+-]?[0-9]+)?")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def make_absolute(path: str | os.PathLike[str]) -> Path:
    """`path` relative to the current folder; `~` is the user's home. `UserError`: an empty one, as an unset variable of
    a shell leaves it, which would be the current folder."""
    if path == "":
        raise UserError("An empty path is given; give a file or a folder, or leave its key out.")
    return Path(path).expanduser().absolute()


def absolute_or_none(path: str | None) -> str | None:
    """`make_absolute` of an optional path."""
    return None if path is None else str(make_absolute(path))


def write_whole(path: str | Path, text: str | Iterable[str], mode: int = 0o666) -> None:
    """Replaces a file in one step, so that after a crash or power cut it holds the old text or the new one.

    `text`: all of it, or its parts in order. `mode`: before the umask. `UserError`: it cannot be written; the old file
    is then untouched.
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


def open_regular(path: str | Path, what: str, remedy: str, most_bytes: int | None = None) -> BinaryIO:
    """Opens a regular file. `UserError`: missing, unreadable, no regular file (pipes are not waited for), or larger
    than `most_bytes`. `what` names the kind of file, `remedy` ends the sentence."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError
        raise UserError(f"{what} {path} cannot be read ({_reason(error)}); {remedy}.") from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (most_bytes is None or found.st_size <= most_bytes):
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(found.st_mode):
        raise UserError(f"{what} {path} has {found.st_size} bytes, more than {most_bytes}; {remedy}.")
    kind = next((name for matches, name in _KINDS if matches(found.st_mode)), "no file")
    raise UserError(f"{what} {path} cannot be read (it is {kind}); {remedy}.")


def keep_open_pipe(path: str | Path, folder: Path) -> Path:
    """Saves a pipe that the shell has opened (`input=<(zcat FILE)`) as a file in `folder`, because an input is read
    several times, also by other processes. Returns any other path unchanged."""
    path = Path(path)
    if not re.fullmatch(r"/dev/(fd/\d+|stdin)|/proc/self/fd/\d+", str(path)):
        return path
    try:
        if not stat.S_ISFIFO(path.stat().st_mode):
            return path
        unfinished = folder / f".input.{os.getpid()}.part"
        digest = hashlib.sha256()
        with open(path, "rb") as pipe, open(unfinished, "wb") as file:
            while piece := pipe.read(1 << 20):
                digest.update(piece)
                file.write(piece)
    except OSError as error:
        raise UserError(f"{path} cannot be kept in {folder} ({_reason(error)}); give a file.") from None
    # named after its content, so that a resumed run with the same text finds it unchanged
    kept = folder / f"input-{digest.hexdigest()[:12]}.jsonl"
    os.replace(unfinished, kept)
    return kept


def check_files(folder: str | Path, what: str, remedy: str) -> None:
    """Checks, before a library reads a folder from outside, that everything named like a checkpoint's file is a regular
    file. `UserError` as in `open_regular`; a folder that cannot be listed is reported when it is read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.endswith(CHECKPOINT_SUFFIXES):
            open_regular(os.path.join(folder, name), what, remedy).close()


def read_text(path: str | Path, what: str, remedy: str, most_bytes: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark. `UserError` as in `open_regular`, or another encoding."""
    try:
        with open_regular(path, what, remedy, most_bytes) as file:
            return file.read(most_bytes + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}); {remedy}.") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({_reason(error)}); {remedy}.") from None


def read_json(path: str | Path, what: str, remedy: str, most_bytes: int = MOST_BYTES, *, infinity: bool = False) -> Any:
    """Parsed JSON of a file from outside. `UserError` as in `read_text` and `parse_json`."""
    return parse_json(read_text(path, what, remedy, most_bytes), f"{what} {path}", remedy, infinity=infinity)


def parse_json(text: str | bytes, where: str, remedy: str, *, infinity: bool = False) -> Any:
    """Parsed JSON. `UserError`, which names `where`: numbers that are not finite (unless `infinity`), whole numbers
    above 10**300, half characters, more than `MOST_DEPTH` levels, or a key twice in an object."""
    try:
        value = json.loads(
            text.decode("utf-8-sig") if isinstance(text, bytes) else text,
            parse_int=_integer,
            parse_float=_infinite if infinity else _finite,
            parse_constant=_infinite if infinity else _finite,
            object_pairs_hook=_object,
        )
        _check_nesting(value)
    except RecursionError:
        raise UserError(f"{where} is nested more than {MOST_DEPTH} levels deep; {remedy}.") from None
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON ({_reason(error)}); {remedy}.") from None
    return value


def read_yaml(path: str | Path, what: str, remedy: str) -> Any:
    """Plain values of a YAML file. `UserError`: see `read_text`; no YAML, tags, too deep, too many values (aliases can
    make a short file endless), a key twice, or an interpolation other than `${gib:NUMBER}` and `${mib:NUMBER}`, because
    a file from outside must not read the environment."""
    import yaml
    from omegaconf import OmegaConf

    where, text = f"{what} {path}", read_text(path, what, remedy, _MOST_YAML_BYTES)
    try:
        _check_events(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        loaded = OmegaConf.load(io.StringIO(text))
        return OmegaConf.to_container(loaded, resolve=False) if OmegaConf.is_config(loaded) else loaded
    except Exception as error:  # PyYAML and OmegaConf also pass on whatever a conversion raises
        raise UserError(f"{where} cannot be read as YAML ({_reason(error)}); {remedy}.") from None


def read_json_lines(path: str | Path, what: str, remedy: str) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not blank. `UserError` as in `parse_json`."""
    with open_regular(path, what, remedy, _MOST_LINES_BYTES) as file:
        for number, line in enumerate(read_lines(file, f"{what} {path}", remedy), 1):
            if line.strip():
                yield number, parse_json(line, f"{what} {path} line {number}", remedy)


def read_lines(file: BinaryIO, where: str, remedy: str) -> Iterator[bytes]:
    """Each line with its line end. `UserError`: one has more than `MOST_BYTES` bytes."""
    for number in itertools.count(1):
        line = file.readline(MOST_BYTES + 1)
        if not line:
            return
        if len(line) > MOST_BYTES:
            raise UserError(f"{where} line {number} has more than {MOST_BYTES} bytes; {remedy}.")
        yield line


def read_csv(text: str, where: str, remedy: str, columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number from 1, cells by column) of a CSV text with a header. `UserError`: one of `columns` is missing, a
    column name is repeated, or a row has more or fewer cells than the header."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader, [])
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(f"{where} lacks the columns {', '.join(missing)}; {remedy}.")
        if len(set(header)) < len(header):
            raise UserError(f"{where} names a column twice in its first line; {remedy}.")
        for cells in reader:
            if cells and len(cells) != len(header):
                place = f"{where} line {reader.line_num}"
                raise UserError(f"{place} has {len(cells)} cells, but its header has {len(header)}; {remedy}.")
            if cells:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num} is not CSV ({_reason(error)}); {remedy}.") from None


def csv_cell(value: Any) -> Any:
    """A value for a table that may be opened in a spreadsheet: text that looks like a formula gets a leading quote, and
    control characters are escaped. Numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = make_printable(value, len(value), keep="\n")
    return f"'{text}" if text.lstrip()[:1] in _FORMULA and not _NUMBER.fullmatch(text) else text


def _check_events(events: Iterable[Any]) -> None:
    """ValueError for anything but plain values, and for aliases that expand to too many of them."""
    sizes: dict[str, int] = {}  # values that an anchor stands for
    open_nodes: list[list[Any]] = [["", 0]]  # anchor and values so far of each open list or object
    for event in events:
        kind, anchor = type(event).__name__, getattr(event, "anchor", None)
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {event.start_mark.line + 1} has the tag {quote(event.tag)}")
        if kind == "AliasEvent":
            # an alias inside of what it names has no size yet
            open_nodes[-1][1] += sizes.get(anchor, MOST_VALUES + 1)
        elif kind == "ScalarEvent":
            _check_scalar(event)
            open_nodes[-1][1] += 1
            sizes[anchor] = 1
        elif kind in ("SequenceStartEvent", "MappingStartEvent"):
            open_nodes.append([anchor, 1])
        elif kind in ("SequenceEndEvent", "MappingEndEvent"):
            name, size = open_nodes.pop()
            sizes[name] = size
            open_nodes[-1][1] += size
        if len(open_nodes) > MOST_DEPTH or open_nodes[-1][1] > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_DEPTH} levels or {MOST_VALUES} values")


def _check_scalar(event: Any) -> None:
    if "${" in re.sub(r"\$\{(gib|mib):[0-9.e+]+\}", "", event.value):
        raise ValueError(f"{quote(event.value)} would be filled in from elsewhere; write the value")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if mark := getattr(error, "problem_mark", None):  # of PyYAML
        return f"line {mark.line + 1}: {make_printable(error.problem, 200, keep='')}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return first_line(error)


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than {MOST_DIGITS}")
    return int(digits)


def _infinite(digits: str) -> float:
    number = float(digits)
    if math.isnan(number):
        raise ValueError("it holds NaN, which is no number")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"it holds {quote(digits)}, but numbers must be finite")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {quote(twice)} stands twice in one object")
    return found


def _check_nesting(value: Any) -> None:
    """RecursionError beyond `MOST_DEPTH` levels; ValueError for text with half a character."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner = []
        for entry in level:
            if isinstance(entry, dict):
                inner += entry.keys()
                inner += entry.values()
            elif isinstance(entry, list):
                inner += entry
            elif isinstance(entry, str) and not entry.isascii():
                _check_characters(entry)
        if depth > MOST_DEPTH + 1:
            raise RecursionError
        level = inner


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"it holds half a character in {quote(text)}") from None


def lock(descriptor: int, refusal: str) -> None:
    """Locks an open file or folder until it is closed; `UserError(refusal)` if somebody else holds it. Does nothing on
    file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:
        pass


def cache_folder() -> Path:
    """The folder of what was measured once for this user: $XDG_CACHE_HOME/ds_llmpq, or ~/.cache/ds_llmpq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_llmpq"


@contextlib.contextmanager
def one_at_a_time(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Creates the folder and keeps other processes out of this block, so that measurements do not disturb each
    other. `waiting` is called where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def refuse_unwritable(folder: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder, wherever it is met in the block, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        file = error.filename or folder
        raise UserError(f"{file} cannot be written ({error.strerror}); make room or give another out=DIR.") from None
