"""Why a rank ended: the rank writes one line, which `run` reads and tells the user. Imports no torch.

When a rank ends, its neighbours lose their connections and end too. The cause is the first failure of another kind.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.files import parse_json
from ds_llmpq.launch.environment import read_place
from ds_llmpq.launch.progress import ERROR_MARK
from ds_llmpq.plan import Plan
from ds_llmpq.validation import Count, Label, Note, one_of, validate

FAILURE_MARK = "ds-llmpq failure: "
_PACKAGE = Path(__file__).resolve().parents[1]
_MOST_MESSAGE = 600  # characters
_MOST_LINE = 3_500  # bytes; longer writes of two ranks may mix in one pipe

# kinds
FAULT = "fault"  # in the program, its libraries or files: a retry would fail again
EXCEPTION = "exception"  # any other
MEMORY = "memory"
# torch's allocator, the C++ library, oneDNN
_OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out_of_memory", "could not create a memory")
CONNECTION = "connection"
PORT = "port"
KINDS = (FAULT, EXCEPTION, MEMORY, CONNECTION, PORT)

_FAULTS = (
    ImportError, TypeError, AttributeError, NameError, SyntaxError, NotImplementedError, UserError, FileNotFoundError,
    IsADirectoryError, NotADirectoryError, PermissionError,
)  # fmt: skip
_FAULT_NAMES = (
    "ImportError", "ModuleNotFoundError", "TypeError", "AttributeError", "NameError", "UnboundLocalError",
    "SyntaxError", "IndentationError", "NotImplementedError",
)  # fmt: skip
# words in messages of gloo, NCCL and torch's store
_CONNECTION_WORDS = re.compile(
    r"connection|gloo|nccl|socket|\bpeer\b|timed? ?out|timeout|broken pipe|reset by|TCPStore", re.IGNORECASE
)
_CONNECTION_TYPES = ("DistNetworkError", "DistStoreError", "DistBackendError")


@dataclass(frozen=True)
class Failure:
    """`file`, `line` and `function` are the innermost frame of this package, or else of all. None means unknown."""

    kind: one_of(*KINDS)
    type: Label
    message: Note
    rank: Count | None = None
    stage: Count | None = None
    device: Label | None = None
    host: Label | None = None
    file: Label | None = None
    line: Count | None = None
    function: Label | None = None

    def describe(self) -> str:
        """Without a full stop: `rank 1 (stage 1, b:0 on b) failed: TypeError: no (in f, g.py:1)`."""
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        parts = [None if self.stage is None else f"stage {self.stage}", self.device]
        where = ", ".join(part for part in parts if part)
        if self.host:
            where += f" on {self.host}"
        what = f"{self.type}: {self.message}" if self.message else self.type
        frame = f" (in {self.function}, {self.file}:{self.line})" if self.file else ""
        return f"{who}{f' ({where})' if where else ''} failed: {what}{frame}"

    def to_line(self) -> str:
        """One line, short enough for a pipe that ranks share."""
        said = self
        while len(text := FAILURE_MARK + json.dumps(asdict(said))) > _MOST_LINE:
            said = replace(said, message=said.message[: len(said.message) // 2] + "...")
        return text + "\n"


def read_failure(line: str) -> Failure | None:
    """The failure in a rank's line, None for other lines. Launchers may prefix the host's name."""
    _, mark, text = line.partition(FAILURE_MARK)
    if not mark:
        return None
    try:
        return validate(Failure, parse_json(text, "failure", ""), "failure", "", ignore_unknown=True)
    except UserError:
        return None


def build_failure(error: BaseException, **who: Any) -> Failure:
    """`who`: rank, stage, device and host, as far as known."""
    frame = _find_frame(error)
    where = {} if frame is None else {"file": frame.filename, "line": frame.lineno, "function": frame.name}
    if frame is not None and (path := Path(frame.filename)).is_relative_to(_PACKAGE):
        where["file"] = str(path.relative_to(_PACKAGE.parent))
    message = make_printable(str(error).strip().partition("\n")[0], _MOST_MESSAGE, keep="")
    return Failure(_classify(error), type(error).__name__, message, **who, **where)


def find_root_cause(failures: Iterable[Failure]) -> Failure | None:
    """The first failure that is not a lost connection, or else the first."""
    failures = list(failures)
    return next((each for each in failures if each.kind != CONNECTION), failures[0] if failures else None)


def identify_rank(plan: Plan | None) -> dict[str, Any]:
    """Rank, stage, device and host of this process, as far as its environment tells."""
    try:
        rank, _ = read_place()
        found = {index: stage for index, stage in enumerate(plan.stages) if stage.rank == rank} if plan else {}
    except (KeyError, ValueError):
        return {}
    who: dict[str, Any] = {"rank": rank, "host": socket.gethostname()}
    for index, stage in found.items():
        who |= {"stage": index, "device": stage.device, "host": stage.host}
    return who


def report_failure(error: BaseException, plan: Plan | None, by_hand: bool, kind: str | None = None) -> None:
    """Writes to standard error: the traceback, for launcher.log, then one line for `run`, or for the user who started
    this rank by hand. `kind`: if it is known already."""
    traceback.print_exception(error)
    failure = build_failure(error, **identify_rank(plan))
    failure = replace(failure, kind=kind) if kind else failure
    sys.stderr.write(f"{ERROR_MARK}{failure.describe()}\n" if by_hand else failure.to_line())


class Tracebacks:
    """Finds the exception at the end of a traceback in the output, for processes that ended without reporting it."""

    _FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
    _END = re.compile(r"(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt))(?:: (?P<message>.*))?$")

    def __init__(self) -> None:
        self.last: Failure | None = None
        self._frame: re.Match[str] | None = None

    def read(self, line: str) -> None:
        if frame := self._FRAME.search(line):
            self._frame = frame
        elif self._frame and (end := self._END.search(line)):
            name = end["type"].rpartition(".")[2]
            message = make_printable(end["message"] or "", _MOST_MESSAGE, keep="")
            self.last = Failure(
                FAULT if name in _FAULT_NAMES else EXCEPTION, name, message, file=self._frame["file"],
                line=int(self._frame["line"]), function=self._frame["function"],
            )  # fmt: skip
            self._frame = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means lack of memory, which on CPUs only the message tells."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _classify(error: BaseException) -> str:
    if is_out_of_memory(error):
        return MEMORY
    if isinstance(error, (ConnectionError, TimeoutError, EOFError)) or type(error).__name__ in _CONNECTION_TYPES:
        return CONNECTION
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return CONNECTION if _CONNECTION_WORDS.search(str(error)) else EXCEPTION
    return FAULT if isinstance(error, _FAULTS) else EXCEPTION


def _find_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    return (ours or frames or [None])[-1]
