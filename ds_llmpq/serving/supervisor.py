"""Supervises a batch: starts the pipeline, monitors it, and restarts it after a death or a hang.

A restart continues from the results that are there. Restarts without a new result are bounded; each new result resets
the count, so a pipeline that fails once a day may run for weeks. After a death for lack of memory, half as many
sequences are in flight. An exception that a rank named is only retried if that start brought a new result. The batch is
done when its files hold every row, whatever the launcher's exit code says.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_llmpq.batch.results import RESULTS_NAME, Tally
from ds_llmpq.errors import Interrupted, RunFailed, UserError
from ds_llmpq.launch.attempt import MISTAKE, Outcome, run_attempt, say
from ds_llmpq.launch.config import SupervisionConfig
from ds_llmpq.launch.failures import EXCEPTION, FAULT, Failure
from ds_llmpq.launch.hosts import find_lost_devices
from ds_llmpq.launch.journal import Journal
from ds_llmpq.launch.launcher import LOG_NAME, Launch, is_local
from ds_llmpq.launch.process_monitor import ExitReason
from ds_llmpq.plan import Plan
from ds_llmpq.serving.job import Job
from ds_llmpq.wording import pluralize

MEASUREMENTS = ("metrics.json", "trace.json")  # written at the end of a start
_LONGEST_PAUSE_SECONDS = 300.0
_MEMORY_WAIT_SECONDS = 30.0  # what was started before may still be ending on another host


@dataclass
class Supervisor:
    """Runs one job to its end. `count()` counts its rows in the files. `replan(lost)` gives a job and its launch
    without the lost devices, or `UserError`."""

    job: Job
    launch: Launch
    settings: SupervisionConfig
    journal: Journal
    count: Callable[[], Tally]
    replan: Callable[[list[str]], tuple[Job, Launch]]
    find_lost: Callable[[Plan], list[str]] = find_lost_devices
    pause: Callable[[float], None] = time.sleep
    restarts: int = 0
    replans: int = 0
    reasons: list[str] = field(default_factory=list)
    memory_warnings: list[dict[str, Any]] = field(default_factory=list)
    _failures: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.job.output)

    def run(self) -> Tally:
        """Returns when the files hold every row. `Interrupted`: drained or stopped. `RunFailed`: a rank named a failure
        that would recur, or restarts brought no result."""
        tally = self.count()
        while not (tally.complete and self.journal.attempts):
            self._write_journal(self.journal.begin_attempt())
            for name in MEASUREMENTS:  # those of an earlier start say nothing about this one
                (self.folder / name).unlink(missing_ok=True)
            try:
                outcome = self._start()
            except KeyboardInterrupt:
                self._end_attempt("stopped by the user", tally)
                raise Interrupted(f"Interrupted; {self._describe_kept()}") from None
            before, tally = tally, self.count()
            if not tally.complete:
                self._handle_exit(outcome, before, tally)
            elif outcome.exit.reason in (ExitReason.HUNG, ExitReason.STOPPED):
                # a stopped rank, woken for its stacks, may have written the rest; the user should still know
                self.reasons.append(self._explain(outcome, tally))
        return tally

    def _handle_exit(self, outcome: Outcome, before: Tally, tally: Tally) -> None:
        """Returns if another start is due, and raises otherwise."""
        failure, reason = outcome.failure, outcome.exit.reason
        if failure is not None and failure.kind == MISTAKE:
            with contextlib.suppress(UserError):  # if the disk is full, the rank's sentence says more
                self._end_attempt(f"mistake: {failure.message}", tally)
            raise self._build_failure(failure.message, outcome)
        if reason in (ExitReason.DRAINED, ExitReason.CUT_OFF):
            self._end_attempt("drained" if reason is ExitReason.DRAINED else "stopped by the user", tally)
            raise Interrupted(f"Interrupted; {self._describe_kept()}")
        why = self._explain(outcome, tally)
        self._end_attempt(why, tally)
        new_results = tally.completed > before.completed
        if failure is not None and not outcome.ran_out and _would_recur(failure, new_results):
            raise self._build_failure(f"{_capitalize(why)}; {self._suggest(failure)}", outcome)
        self._failures = 1 if new_results else self._failures + 1
        self._recover(why, self._halve_sequences() if outcome.ran_out else "", outcome)

    def _start(self) -> Outcome:
        """One start of the launcher."""
        job = replace(self.job, memory_wait_seconds=_MEMORY_WAIT_SECONDS) if self.restarts else self.job
        return run_attempt(self.launch, job.to_token(), self.settings.hang_seconds, self.settings.grace_seconds)

    def _recover(self, why: str, changed: str, outcome: Outcome) -> None:
        """Waits until a restart can succeed, within the bound on restarts; plans again if a device does not come back.
        `changed`: what is different in the next start."""
        self.reasons.append(why)
        lost: list[str] = []
        while self._failures <= self.settings.restarts:
            seconds = min(self.settings.backoff_seconds * 2 ** (self._failures - 1), _LONGEST_PAUSE_SECONDS)
            gone = f", {', '.join(lost)} does not answer" if lost else ""
            say(f"{why}{gone}; starting again{changed} in {seconds:g} s ({self._failures} of {self.settings.restarts})")
            self._wait(seconds)
            lost = self.find_lost(self.job.plan)
            if not lost:
                self.restarts += 1
                return
            self._failures += 1
        lost = lost or self.find_lost(self.job.plan)
        if lost and self.settings.on_loss == "replan":
            say(f"{', '.join(lost)} did not come back; planning on what is left")
            self.job, self.launch = self.replan(lost)
            self.restarts += 1
            self.replans += 1
            self._failures = 0
            return
        gone = f", and {', '.join(lost)} did not come back" if lost else ""
        raise self._build_failure(
            f"{_capitalize(why)} and {self.settings.restarts} restarts in a row brought no result{gone}; "
            f"{self._describe_kept()} The reason is in {self.launch.folder / LOG_NAME}.",
            outcome,
        )

    def _halve_sequences(self) -> str:
        """Halves the sequences in flight; returns that in words, or nothing if there is only one."""
        before = self.job.plan.workload.sequences
        if before == 1:
            return ""
        self.job = replace(self.job, plan=self.job.plan.with_fewer_sequences())
        now = self.job.plan.workload.sequences
        self.memory_warnings.append({"sequences": before, "sequences_now": now})
        return f" with {pluralize(now, 'sequence')} in flight instead of {before}"

    def _wait(self, seconds: float) -> None:
        try:
            self.pause(seconds)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted; {self._describe_kept()}") from None

    def _explain(self, outcome: Outcome, tally: Tally) -> str:
        if outcome.exit.reason is not ExitReason.ENDED:
            return outcome.explain(self.settings.hang_seconds)
        if not is_local(self.launch.hosts[0]) and not (self.folder / RESULTS_NAME).exists():
            raise self._build_failure(
                f"The pipeline ended well, but its files are not in {self.folder}: rank 0 wrote them on host "
                f"{self.launch.hosts[0]}; start run there, or give out= on a file system that both hosts share.",
                outcome,
            )
        return f"the pipeline ended, but {tally.lacking} of {tally.total} rows have neither a result nor an error"

    def _suggest(self, failure: Failure) -> str:
        again = (
            "no restart would change that, so compare the installed libraries with the tested versions, or report it "
            "with the traceback"
            if failure.kind == FAULT
            else "that was before any new result, so it was not tried again; see the traceback"
        )
        return f"{again} in {self.launch.folder / LOG_NAME}; {self._describe_kept()}"

    def _describe_kept(self) -> str:
        return f"what finished is kept in {self.folder}, and the same command with out={self.folder} resumes there."

    def _build_failure(self, sentence: str, outcome: Outcome) -> RunFailed:
        return RunFailed(sentence, outcome.record() | {"restarts": self.restarts})

    def _end_attempt(self, reason: str, tally: Tally) -> None:
        # the log then ends with the reason, not with what another rank met afterwards
        with contextlib.suppress(OSError), open(self.launch.folder / LOG_NAME, "a", encoding="utf-8") as log:
            log.write(f"ds-llmpq: {reason}\n")
        self._write_journal(self.journal.end_attempt(reason, tally.completed))

    def _write_journal(self, journal: Journal) -> None:
        self.journal = journal
        journal.write(self.folder)


def _would_recur(failure: Failure, new_results: bool) -> bool:
    return failure.kind == FAULT or (failure.kind == EXCEPTION and not new_results)


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
