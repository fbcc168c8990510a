"""Monitors a running launcher until it exits: its output, death, silence, and signals from the user.

The launcher is only ended by SIGKILL (see `launch.launcher`), together with all it started here. These processes carry
the mark of the run in their environment, so that none is missed, and no other process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

import psutil

from ds_llmpq.launch.environment import RUN_MARK

# message of DeepSpeed's per-host launcher (0.16 to 0.19) when a rank died, with the rank's exit code
_RANK_DIED = re.compile(rb"exits with return code = (-?\d+)")
# for the other ranks to end by themselves, so that their messages reach the log
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.25
# a longer gap between two checks means that `run` itself was suspended, so silence means nothing
_SUSPENDED_SECONDS = 10.0
_STARTUP_SECONDS = 120.0
_STACKS_SECONDS = 3.0


class Line(Enum):
    """The kind of a rank's line: a heartbeat, which is not logged; text; or a failure, after which the other ranks have
    a few seconds to report theirs."""

    HEARTBEAT = "heartbeat"
    TEXT = "text"
    FAILURE = "failure"


class ExitReason(Enum):
    """Why the run ended."""

    ENDED = "ended"
    DIED = "died"
    HUNG = "hung"
    STOPPED = "stopped"  # a signal stopped a process, and nobody woke it
    DRAINED = "drained"
    CUT_OFF = "cut off"  # asked to drain, but not done within the grace period


@dataclass(frozen=True)
class Exit:
    """`code`: exit code of the first rank that died, according to its launcher, else of the launcher; negative: the
    signal; None if unknown."""

    reason: ExitReason
    code: int | None


@dataclass(frozen=True)
class MonitorOptions:
    """What the monitor looks for, and for how long it waits.

    `on_line` gets every line. `hang_seconds`: the silence that counts as a hang (None: never); until `started()`, at
    least two minutes, because imports are silent. `drain()` passes on a first Ctrl-C, SIGTERM or SIGHUP and returns
    whether anything is in flight; without it, the first one stops everything. `hidden` is left out of the log, because
    a job has thousands of characters. A process here that is stopped (SIGSTOP) for `stopped_seconds` counts as hung.
    """

    on_line: Callable[[str], Line | None]
    hang_seconds: float | None = None
    started: Callable[[], bool] = lambda: True
    drain: Callable[[], bool] | None = None
    drain_seconds: float = 60.0
    hidden: str = ""
    stopped_seconds: float = 30.0


def monitor(line: list[str], env: dict[str, str], log_file: Path, mark: str, options: MonitorOptions) -> Exit:
    """Runs a command line until it ends. KeyboardInterrupt passes on after all its processes have been stopped."""
    with open(log_file, "ab") as log, _Signals() as signals:
        child = subprocess.Popen(
            line, env=env | {RUN_MARK: mark}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return _Monitor(child, log, mark, options, signals).run()
        finally:
            kill_launcher(child, mark)
            child.stdout.close()


class _Monitor:
    def __init__(self, child: subprocess.Popen, log: BinaryIO, mark: str, options: MonitorOptions, signals: _Signals):
        self.child, self.log, self.mark, self.options, self.signals = child, log, mark, options, signals
        self.heard = self.looked = time.monotonic()
        self.rest = b""
        self.deadline: float | None = None
        self.reason: ExitReason | None = None
        self.code: int | None = None
        self.stopped = _StoppedProcesses(mark, options.stopped_seconds)
        self.poller = select.poll()
        self.poller.register(child.stdout, select.POLLIN)

    def run(self) -> Exit:
        while self._is_within_bounds() and self._read(_POLL_SECONDS):
            pass
        if self.reason in (ExitReason.HUNG, ExitReason.STOPPED):
            self._wait_for_stacks()
        launcher = self.child.poll()
        if launcher is None and self.reason in (None, ExitReason.DRAINED):
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher = self.child.wait(_GRACE_SECONDS)
        code = launcher if self.code is None else self.code
        if self.reason is None:
            # DeepSpeed's runner exits with 0 if a signal ended its child, whose ranks live on
            alive = [process for process in list_marked(self.mark) if process.pid != self.child.pid]
            self.reason = ExitReason.ENDED if code == 0 and not alive else ExitReason.DIED
        return Exit(self.reason, code)

    def _is_within_bounds(self) -> bool:
        """False when it is time to stop; `reason` says why."""
        now = time.monotonic()
        if now - self.looked > _SUSPENDED_SECONDS:
            self.heard = now
        self.looked = now
        if self.signals.count >= 2 or (self.signals.count and self.options.drain is None):
            raise KeyboardInterrupt
        if self.signals.count and self.reason is not ExitReason.DRAINED:
            if not self.options.drain():
                raise KeyboardInterrupt
            self.reason, self.deadline = ExitReason.DRAINED, now + self.options.drain_seconds
        if self.deadline is None and self.child.poll() is not None:
            # if it was killed, its ranks live on and keep writing; if it ended, its last lines are still in the pipe
            self.deadline = now + _GRACE_SECONDS
        if self.deadline is not None:
            if now > self.deadline and self.reason is ExitReason.DRAINED:
                self.reason = ExitReason.CUT_OFF
            return now <= self.deadline
        if self._silent(now - self.heard):
            self.reason = ExitReason.HUNG
        elif self.stopped.stopped_too_long(now):
            self.reason = ExitReason.STOPPED
        return self.reason is None

    def _silent(self, seconds: float) -> bool:
        bound = self.options.hang_seconds
        if bound is None or seconds <= bound:
            return False
        return seconds > _STARTUP_SECONDS or self.options.started()

    def _read(self, seconds: float) -> bool:
        """Handles what is written within so many seconds. False: nobody is left who could write."""
        if not self.poller.poll(seconds * 1e3):
            return True
        data = os.read(self.child.stdout.fileno(), 1 << 16)
        self._handle(data)
        return bool(data)

    def _handle(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            kind = self.options.on_line(line.decode(errors="replace"))
            if kind is Line.HEARTBEAT:
                self.heard = time.monotonic()
                continue
            with contextlib.suppress(OSError):  # a full disk is reported when results are written
                hidden = self.options.hidden.encode()
                self.log.write((line.replace(hidden, b"...") if hidden else line) + b"\n")
                self.log.flush()
            if (died := _RANK_DIED.search(line)) and self.code is None:
                self.code = int(died[1])
            if (died or kind is Line.FAILURE) and self.reason is None and self.deadline is None:
                self.reason, self.deadline = ExitReason.DIED, time.monotonic() + _GRACE_SECONDS

    def _wait_for_stacks(self) -> None:
        """Reads the stacks that ranks write by their own timers; stopped ones here are woken to do so."""
        for process in list_marked(self.mark):
            with contextlib.suppress(psutil.Error):
                if _is_stopped(process):
                    process.send_signal(signal.SIGUSR1)
                    process.send_signal(signal.SIGCONT)
        end = time.monotonic() + _STACKS_SECONDS
        while (left := end - time.monotonic()) > 0 and self._read(left):
            pass


class _StoppedProcesses:
    """Looks for stopped processes of the run from time to time."""

    def __init__(self, mark: str, bound_seconds: float):
        self._mark, self._bound = mark, bound_seconds
        self._looked = time.monotonic()
        self._since: dict[int, float] = {}

    def stopped_too_long(self, now: float) -> bool:
        if now - self._looked < self._bound / 6:
            return False
        if now - self._looked > self._bound:  # this process was stopped too
            self._since = {}
        self._looked = now
        stopped = [process.pid for process in list_marked(self._mark) if _is_stopped(process)]
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        return any(now - since >= self._bound for since in self._since.values())


def kill_marked(mark: str) -> None:
    """Kills what a killed run left on this machine."""
    found = list_marked(mark)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=10)


def kill_launcher(child: subprocess.Popen, mark: str) -> None:
    """Kills the launcher and all it started here; ranks on other hosts end when their connection breaks."""
    found: dict[int, psutil.Process] = {}
    for _ in range(2):  # again for processes started meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(child.pid)
            found |= {process.pid: process for process in [launcher, *launcher.children(recursive=True)]}
        found |= {process.pid: process for process in list_marked(mark)}
        for process in found.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
    child.wait()
    # the next attempt needs their memory, their ports and the lock on the results
    psutil.wait_procs([process for process in found.values() if process.pid != child.pid], timeout=10)


def list_marked(mark: str) -> list[psutil.Process]:
    """The processes of a run on this machine."""
    return [process for process in psutil.process_iter() if _read_mark(process) == mark]


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _read_mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(RUN_MARK)
    except psutil.Error:
        return None


class _Signals:
    """Counts Ctrl-C, SIGTERM and SIGHUP instead of ending; ignored signals stay ignored."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            for number in [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.count += 1
