"""One start of the pipeline: reads its output, and determines how and why it ended."""

from __future__ import annotations

import signal
import sys
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from ds_llmpq.cluster.detect import count_memory_kills
from ds_llmpq.errors import make_printable
from ds_llmpq.launch.environment import RUN_MARK
from ds_llmpq.launch.failures import CONNECTION, MEMORY, PORT, Failure, Tracebacks, find_root_cause, read_failure
from ds_llmpq.launch.heartbeat import ALIVE_MARK
from ds_llmpq.launch.launcher import LOG_NAME, Launch, run_launcher
from ds_llmpq.launch.process_monitor import Exit, ExitReason, Line, MonitorOptions
from ds_llmpq.launch.progress import ERROR_MARK, ProgressBar, parse_progress

SERVING_PHASE = "prompts"
MISTAKE = "mistake"  # a kind of failure: a rank's UserError
_MOST_PORTS = 5  # tries, if other processes take the port each time


@dataclass(frozen=True)
class Outcome:
    """How a start ended. `failure`: the cause that a rank or the launcher named; `ran_out`: of memory."""

    exit: Exit
    failure: Failure | None = None
    ran_out: bool = False

    @property
    def kind(self) -> str:
        """The kind of failure in failure.json."""
        if self.ran_out:
            return MEMORY
        return self.exit.reason.value if self.failure is None else self.failure.kind

    def record(self) -> dict[str, Any]:
        """The record in failure.json."""
        return ({} if self.failure is None else asdict(self.failure)) | {"kind": self.kind}

    def explain(self, hang_seconds: float) -> str:
        """The beginning of a sentence, without a capital letter."""
        reason, code, failure = self.exit.reason, self.exit.code, self.failure
        if self.ran_out:
            return "the pipeline ran out of memory"
        if reason is ExitReason.HUNG:
            return f"nothing moved for {hang_seconds:g} s (stacks are in {LOG_NAME})"
        if reason is ExitReason.STOPPED:
            seconds = MonitorOptions.stopped_seconds
            return f"a process was stopped, and nobody woke it for {seconds:g} s (stacks are in {LOG_NAME})"
        if failure is not None and failure.kind != CONNECTION:
            return failure.describe()
        if code is not None and code < 0:
            return f"the pipeline was ended by signal {-code}"
        if failure is not None:
            return failure.describe()
        return "the launcher ended before its ranks" if not code else f"the pipeline ended with exit code {code}"


def run_attempt(launch: Launch, job: str, hang_seconds: float, drain_seconds: float | None = None) -> Outcome:
    """Starts the ranks with a job's token and monitors them until they end; if their port was taken, tries another one.
    `drain_seconds`: time for requests in flight after a first Ctrl-C; None: the first one ends everything with
    KeyboardInterrupt."""
    for _ in range(_MOST_PORTS):
        listener, killed = Listener(uuid.uuid4().hex), count_memory_kills()
        bound = 1.1 * hang_seconds  # the ranks' own bound is shorter, so that they write their stacks first
        watch = MonitorOptions(listener.on_line, bound, listener.alive)
        if drain_seconds is not None:
            watch = MonitorOptions(listener.on_line, bound, listener.serving, listener.drain, drain_seconds)
        try:
            ended = run_launcher(launch, ["--job", job], watch, listener.mark)
        finally:
            listener.bar.close()
        outcome = listener.outcome(ended, count_memory_kills() > killed)
        if outcome.kind != PORT:
            break
        say("another process took the ranks' port; starting again on another one")
    return outcome


class Listener:
    """Reads the lines of one start, shows progress, and passes on requests to drain."""

    def __init__(self, mark: str):
        self.mark = mark
        self.bar = ProgressBar()
        self._failures: list[Failure] = []
        self._tracebacks = Tracebacks()
        self._phase = ""
        self._alive = False
        self._driver: int | None = None

    def on_line(self, line: str) -> Line:
        if (progress := parse_progress(line)) is not None:
            self._phase, self._driver = progress.phase, progress.pid
            self.bar.show(progress.phase, progress.done, progress.total, progress.note)
            return Line.HEARTBEAT
        if ALIVE_MARK in line:
            self._alive = True
            return Line.HEARTBEAT
        failure = read_failure(line)
        if ERROR_MARK in line:
            failure = Failure(MISTAKE, "UserError", make_printable(line.partition(ERROR_MARK)[2].strip()))
        if failure is not None:
            self._failures.append(failure)
            return Line.FAILURE
        self._tracebacks.read(line)
        return Line.TEXT

    def outcome(self, ended: Exit, kernel_killed: bool) -> Outcome:
        """`kernel_killed`: the kernel killed a process here for lack of memory."""
        failure = find_root_cause(self._failures)
        if failure is None and ended.reason is ExitReason.DIED and (ended.code or 0) > 0:
            failure = self._tracebacks.last
        ran_out = ended.reason is ExitReason.DIED and (
            kernel_killed or (failure is not None and failure.kind == MEMORY)
        )
        return Outcome(ended, failure, ran_out)

    def alive(self) -> bool:
        """Whether a rank has reported that it is alive."""
        return self._alive

    def serving(self) -> bool:
        return self._phase == SERVING_PHASE

    def drain(self) -> bool:
        """Asks rank 0 to finish what is in flight. False if nothing is, or rank 0 cannot be asked."""
        if not self.serving() or self._driver is None:
            return False
        try:
            driver = psutil.Process(self._driver)
            if driver.environ().get(RUN_MARK) != self.mark:
                return False
            driver.send_signal(signal.SIGUSR2)
        except (psutil.Error, ValueError):
            return False
        say("finishing what is in flight; once more to stop at once")
        return True


def say(text: str) -> None:
    print(f"\nds-llmpq: {text}", file=sys.stderr, flush=True)
