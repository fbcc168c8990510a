"""SIGKILL, SIGTERM and SIGSTOP for any process of a run, alone and in pairs, in any phase, at default settings.

Nothing is started again but the user's own command, and that only where `run` itself was struck. Everything follows
from a seed but the machine's own timing.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from harness import VICTIMS, find_victim, rows_in, rows_of

# the harness has put the folder of these on the path
from launching import Command, gone

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
PHASES = ("starting", "serving", "draining", "after a drain", "restarted")
_MOST_COMMANDS = 5
_WOKEN_AFTER_SECONDS = 6.0  # a stopped `run` is somebody's Ctrl-Z: nothing watches over it, and it is woken again
_LONGEST_SECONDS = 400.0


@dataclass(frozen=True)
class Strike:
    """Signals to victims at one moment. `results`: so many more than at its command's begin are there by then."""

    phase: str
    blows: tuple[tuple[str, str], ...]  # (victim, name of the signal)
    results: int
    delay_seconds: float

    @classmethod
    def of_seed(cls, seed: int, requests: int) -> Strike:
        rng = random.Random(seed)
        phase = PHASES[seed % len(PHASES)]
        victims = rng.sample(VICTIMS, 2 if rng.random() < 0.4 else 1)
        blows = tuple((victim, rng.choice(("KILL", "KILL", "TERM", "STOP"))) for victim in victims)
        if phase == "starting":
            return cls(phase, blows, 0, rng.uniform(0.0, 6.0))
        return cls(phase, blows, rng.randrange(1, requests // 3), rng.uniform(0.0, 0.3))

    def __str__(self) -> str:
        blows = " + ".join(f"{name} {victim}" for victim, name in self.blows)
        when = f"{self.delay_seconds:.1f} s" if self.phase == "starting" else f"{self.results} results"
        return f"{self.phase}, {when}: {blows}"


@dataclass
class Outcome:
    """What came of one run. `problem` is empty if all held: every row once, never `finished` before that, nothing
    left over, no command but those that a struck `run` needs."""

    strike: str
    seed: int | None = None
    struck: bool = False
    codes: list[int] = field(default_factory=list)
    restarts: int = 0
    seconds: float = 0.0
    greedy_equal: int = 0
    sampled_equal: int = 0
    problem: str = ""


class KillRun:
    """One run with one strike. `requests`: rows of the input."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], requests: int, strike: Strike):
        self.out, self.requests, self.strike = folder / "out", requests, strike
        self.log = folder / "output"
        self.arguments = ("run", f"out={self.out}", *arguments)
        self.outcome = Outcome(str(strike))
        self.run_struck = False
        self._waking = 0.0
        self._commands: list[Command] = []

    def go(self, expected: Mapping[str, bytes]) -> Outcome:
        """Runs to the end and compares with the rows of an undisturbed run."""
        started = time.monotonic()
        try:
            if self.strike.phase == "after a drain":
                self._drain_first()
            while self._command() != 0:
                if not self.run_struck:
                    raise AssertionError(f"run ended with code {self.outcome.codes[-1]}, though it was not struck")
                if len(self.outcome.codes) >= _MOST_COMMANDS:
                    raise AssertionError(f"it did not end in {_MOST_COMMANDS} commands")
            self._judge(expected)
        except AssertionError as error:
            self.outcome.problem = str(error)
        self.outcome.seconds = round(time.monotonic() - started, 1)
        return self.outcome

    def _drain_first(self) -> None:
        command = self._new_command()
        with open(self.log, "ab") as output:
            process = command.start(output)
            try:
                self._until(process, lambda: rows_in(self.results) >= 1 + self.requests // 10)
                process.send_signal(signal.SIGTERM)
                self.outcome.codes.append(process.wait(_LONGEST_SECONDS))
            finally:
                process.kill()
                process.wait()
        if self.outcome.codes != [130] and self.outcome.codes != [0]:
            raise AssertionError(f"a drain ended with code {self.outcome.codes[0]}")

    def _command(self) -> int:
        """The user's command, once; the strike falls if it has not yet."""
        command = self._new_command()
        with open(self.log, "ab") as output:
            process = command.start(output)
            try:
                if not self.outcome.struck:
                    self._strike(process, command)
                self._until(process, lambda: False)
            finally:
                process.kill()
                process.wait()
        self.outcome.codes.append(process.returncode)
        return process.returncode

    def _strike(self, process: subprocess.Popen, command: Command) -> None:
        before = rows_in(self.results)
        if self.strike.phase == "starting":
            first = self.strike.blows[0][0]
            self._until(process, lambda: find_victim(first, process, command) is not None)
        else:
            self._until(process, lambda: rows_in(self.results) >= before + self.strike.results)
        if self.strike.phase == "draining":
            process.send_signal(signal.SIGTERM)
            self.run_struck = True
        if self.strike.phase == "restarted" and (rank := find_victim("rank 1", process, command)) is not None:
            rank.kill()
            self._until(process, lambda: not rank.is_running())
            self._until(process, lambda: self._new(rank.pid, process, command))
        time.sleep(self.strike.delay_seconds)
        victims = [(find_victim(victim, process, command), name, victim) for victim, name in self.strike.blows]
        for found, name, victim in victims:
            if found is None or process.poll() is not None:
                continue
            try:
                found.send_signal(SIGNALS[name])
            except psutil.NoSuchProcess:
                continue
            self.outcome.struck = True
            self.run_struck |= victim == "run"
            if (victim, name) == ("run", "STOP"):
                self._waking = time.monotonic() + _WOKEN_AFTER_SECONDS

    def _new_command(self) -> Command:
        self._commands.append(Command(self.arguments))
        return self._commands[-1]

    def _new(self, old: int, process: subprocess.Popen, command: Command) -> bool:
        rank = find_victim("rank 1", process, command)
        return rank is not None and rank.pid != old

    def _until(self, process: subprocess.Popen, reached) -> None:
        """Returns when `reached()`, or when the command has ended; looks at what it claims all the time."""
        end = time.monotonic() + _LONGEST_SECONDS
        while process.poll() is None and not reached():
            if time.monotonic() > end:
                raise AssertionError(f"nothing came of it in {_LONGEST_SECONDS:g} s")
            if self._waking and time.monotonic() > self._waking:
                self._waking = 0.0
                process.send_signal(signal.SIGCONT)
            self._check_claim()
            time.sleep(0.02)
        self._check_claim()

    def _check_claim(self) -> None:
        try:
            state = json.loads((self.out / "run.json").read_text())["state"]
        except FileNotFoundError:
            return
        if state == "finished" and rows_in(self.results) != self.requests:
            raise AssertionError(f"finished with {rows_in(self.results)} of {self.requests} rows")

    def _judge(self, expected: Mapping[str, bytes]) -> None:
        rows = rows_of(self.out)
        if rows.keys() != expected.keys():
            raise AssertionError(f"{len(expected.keys() - rows.keys())} results are lost")
        journal = json.loads((self.out / "run.json").read_text())
        if journal["state"] != "finished":
            raise AssertionError(f"run.json says {journal['state']}")
        self.outcome.restarts = json.loads((self.out / "metrics.json").read_text())["restarts"]["restarts"]
        self.outcome.greedy_equal = sum(rows[name] == expected[name] for name in rows if not is_sampled(name))
        self.outcome.sampled_equal = sum(rows[name] == expected[name] for name in rows if is_sampled(name))
        if not all(gone(command.processes) for command in self._commands):
            raise AssertionError("processes were left behind")

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"


def is_sampled(custom_id: str) -> bool:
    return custom_id.startswith("sampled")


def write_mixed(file: Path, requests: int, longest: int = 32) -> Path:
    """So many short requests of unequal lengths; every third one is sampled."""
    rng = random.Random(7)
    words = "the path of a file is list join split name returns what does this function do open string".split()  # noqa: SIM905
    with open(file, "w") as stream:
        for index in range(requests):
            body = {
                "prompt": " ".join(rng.choices(words, k=rng.randrange(3, 20))),
                "max_tokens": rng.randrange(4, longest),
                "ignore_eos": True,
            } | ({"temperature": 0.8} if index % 3 == 2 else {})
            name = f"{'sampled' if index % 3 == 2 else 'greedy'}-{index}"
            row = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
            stream.write(json.dumps(row) + "\n")
    return file


def prepare(folder: Path, requests: int) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """The arguments that every run shares (an input, and the plan of an undisturbed run), and that one's rows."""
    rows = write_mixed(folder / "rows.jsonl", requests)
    quiet = folder / "undisturbed"
    ended = Command(("run", f"out={quiet}", "+experiment=demo", f"input={rows}")).run()
    assert ended.returncode == 0, ended.stderr
    return (f"plan={quiet / 'plan.json'}", f"input={rows}"), rows_of(quiet)


def as_record(outcome: Outcome) -> dict:
    return asdict(outcome)
