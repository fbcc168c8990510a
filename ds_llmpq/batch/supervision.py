"""Keeping a batch going: starts the pipeline, follows it, and starts it again after a death or a hang.

A restart goes on from the results that are there. Restarts are bounded where they bring nothing: each new result
gives the batch its full number again, so a pipeline that fails once a day may run for weeks. After a death for want of
memory, half as many sequences are in flight.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from ds_llmpq.batch.job import Job
from ds_llmpq.batch.journal import Journal
from ds_llmpq.batch.progress import ERROR_MARK, MEMORY_MARK, Bar, read
from ds_llmpq.batch.results import read_finished
from ds_llmpq.cluster.detect import memory_kills
from ds_llmpq.engine.following import RUN_MARK, Ended, Line, Reason, Watch
from ds_llmpq.engine.hosts import lost_devices
from ds_llmpq.engine.launcher import LOG_NAME, Launch, followed
from ds_llmpq.engine.lifeline import ALIVE_MARK
from ds_llmpq.errors import Interrupted, UserError
from ds_llmpq.planner.plan import Plan
from ds_llmpq.schema import SupervisionConfig

SERVING_PHASE = "prompts"
ON_LOSS = ("stop", "replan")
_LONGEST_PAUSE_SECONDS = 300.0
_MEMORY_WAIT_SECONDS = 30.0  # what was started before may still be ending on another host


def checked_supervision(settings: SupervisionConfig) -> SupervisionConfig:
    """`UserError` for a number out of range."""
    if settings.on_loss not in ON_LOSS:
        raise UserError(f"run.on_loss is {settings.on_loss!r} but must be one of {', '.join(ON_LOSS)}.")
    for name, low in (("restarts", 0), ("backoff_seconds", 0), ("hang_seconds", 5), ("grace_seconds", 0)):
        value = getattr(settings, name)
        if not low <= value < float("inf"):
            raise UserError(f"run.{name} is {value} but must be at least {low} and finite.")
    return settings


@dataclass
class Supervisor:
    """Runs one job to its end. `replan(lost)`: a job and its launch without those devices, or `UserError`."""

    job: Job
    launch: Launch
    settings: SupervisionConfig
    journal: Journal
    replan: Callable[[list[str]], tuple[Job, Launch]]
    find_lost: Callable[[Plan], list[str]] = lost_devices
    pause: Callable[[float], None] = time.sleep
    count_kills: Callable[[], int] = memory_kills
    restarts: int = 0
    replans: int = 0
    reasons: list[str] = field(default_factory=list)
    memory_warnings: list[dict[str, Any]] = field(default_factory=list)
    _failures: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.job.output)

    def run(self) -> None:
        """Returns when the pipeline ended well. `Interrupted`: drained or stopped. `UserError`: a rank named a
        mistake, which a restart would meet again, or restarts brought nothing."""
        results = len(read_finished(self.folder))
        while True:
            self._note(self.journal.begun())
            try:
                ended, mistakes, ran_out = self._attempt()
            except KeyboardInterrupt:
                self._end("stopped by the user")
                raise Interrupted(f"Interrupted; {self._kept()}") from None
            before, results = results, len(read_finished(self.folder))
            if mistakes:
                with contextlib.suppress(UserError):  # on a full disk, the rank's sentence says more
                    self._end(f"mistake: {mistakes[0]}")
                raise UserError(mistakes[0])
            if ended.reason in (Reason.DRAINED, Reason.CUT_OFF):
                self._end("drained" if ended.reason is Reason.DRAINED else "stopped by the user")
                raise Interrupted(f"Interrupted; {self._kept()}")
            if ended.reason is Reason.ENDED:
                return
            why = "the pipeline ran out of memory" if ran_out else self._why(ended)
            self._end(why)
            self._failures = 1 if results > before else self._failures + 1
            self._recover(why, self._fewer() if ran_out else "")

    def _attempt(self) -> tuple[Ended, list[str], bool]:
        """One start of the launcher: how it ended, the mistakes that ranks named, and whether it died for want of
        memory: a rank said so, or the kernel has killed something here."""
        attempt, killed = _Attempt(uuid.uuid4().hex), self.count_kills()
        settings = self.settings
        # a little longer than the ranks' own bound, after which each writes its stacks
        bound = settings.hang_seconds * 1.1
        job = replace(self.job, memory_wait_seconds=_MEMORY_WAIT_SECONDS) if self.restarts else self.job
        watch = Watch(attempt.on_line, bound, attempt.serving, attempt.drain, settings.grace_seconds)
        try:
            ended = followed(self.launch, ["--job", job.to_token()], watch, attempt.mark)
            ran_out = ended.reason is Reason.DIED and (attempt.ran_out or self.count_kills() > killed)
            return ended, attempt.mistakes, ran_out
        finally:
            attempt.bar.close()

    def _recover(self, why: str, changed: str) -> None:
        """Waits until a restart has a chance, within the bound on restarts; plans anew where a device stays away.
        `changed`: what the next start does otherwise."""
        self.reasons.append(why)
        lost: list[str] = []
        while self._failures <= self.settings.restarts:
            seconds = min(self.settings.backoff_seconds * 2 ** (self._failures - 1), _LONGEST_PAUSE_SECONDS)
            gone = f", {', '.join(lost)} does not answer" if lost else ""
            _say(
                f"{why}{gone}; starting again{changed} in {seconds:g} s ({self._failures} of {self.settings.restarts})"
            )
            self._wait(seconds)
            lost = self.find_lost(self.job.plan)
            if not lost:
                self.restarts += 1
                return
            self._failures += 1
        lost = lost or self.find_lost(self.job.plan)
        if lost and self.settings.on_loss == "replan":
            _say(f"{', '.join(lost)} did not come back; planning on what is left")
            self.job, self.launch = self.replan(lost)
            self.restarts += 1
            self.replans += 1
            self._failures = 0
            return
        gone = f", and {', '.join(lost)} did not come back" if lost else ""
        raise UserError(
            f"{why.capitalize()} and {self.settings.restarts} restarts in a row brought no result{gone}; "
            f"{self._kept()} The reason is in {self.launch.folder / LOG_NAME}."
        )

    def _fewer(self) -> str:
        """The job with half as many sequences in flight; says so, or nothing where it is one already."""
        before = self.job.plan.workload.sequences
        if before == 1:
            return ""
        self.job = replace(self.job, plan=self.job.plan.with_fewer_sequences())
        now = self.job.plan.workload.sequences
        self.memory_warnings.append({"sequences": before, "sequences_now": now})
        return f" with {now} sequences in flight instead of {before}"

    def _wait(self, seconds: float) -> None:
        try:
            self.pause(seconds)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted; {self._kept()}") from None

    def _why(self, ended: Ended) -> str:
        if ended.reason is Reason.HUNG:
            return f"nothing moved for {self.settings.hang_seconds:g} s (stacks are in {LOG_NAME})"
        how = f"was ended by signal {-ended.code}" if ended.code < 0 else f"ended with exit code {ended.code}"
        return f"the pipeline {how}"

    def _kept(self) -> str:
        return f"what finished is kept in {self.folder}, and the same command with out={self.folder} goes on there."

    def _end(self, reason: str) -> None:
        self._note(self.journal.ended(reason, len(read_finished(self.folder))))

    def _note(self, journal: Journal) -> None:
        self.journal = journal
        journal.write(self.folder)


class _Attempt:
    """What the lines of one start say."""

    def __init__(self, mark: str):
        self.mark = mark
        self.bar = Bar()
        self.mistakes: list[str] = []
        self.ran_out = False
        self._phase = ""
        self._driver: int | None = None

    def on_line(self, line: str) -> Line:
        if (fields := read(line)) is not None:
            self._phase, self._driver = fields["phase"], fields["pid"]
            self.bar.show(self._phase, fields["done"], fields["total"], fields["note"])
            return Line.LIFE
        if ALIVE_MARK in line:
            return Line.LIFE
        if ERROR_MARK in line:
            self.mistakes.append(line.partition(ERROR_MARK)[2])
        self.ran_out |= MEMORY_MARK in line
        return Line.TEXT

    def serving(self) -> bool:
        return self._phase == SERVING_PHASE

    def drain(self) -> bool:
        """Asks rank 0 to finish what is in flight; False if nothing is, or it cannot be asked."""
        if not self.serving() or self._driver is None:
            return False
        try:
            driver = psutil.Process(self._driver)
            if driver.environ().get(RUN_MARK) != self.mark:
                return False
            driver.send_signal(signal.SIGUSR2)
        except (psutil.Error, ValueError):
            return False
        _say("finishing what is in flight; once more to stop at once")
        return True


def _say(text: str) -> None:
    print(f"\nds-llmpq: {text}", file=sys.stderr, flush=True)
