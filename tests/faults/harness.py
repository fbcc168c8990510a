"""Faults put into real runs: a small batch under `ds-llmpq run`, a victim, a signal, a moment; what holds after it.

Everything follows from a seed but the machine's own timing: the same seed picks the same victim at the same progress.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# appended: the tests of each folder import their own conftest by that name
sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))

from launching import Command, gone

REQUESTS = 200
VICTIMS = ("rank 0", "rank 1", "launcher", "host launcher", "run")
_TEXT = (
    "def join(a, *p):\n    path = a\n    for b in p:\n        if b.startswith('/'):\n            path = b\nimport os\n"
)
# float32, so that greedy texts do not depend on which rows run together
PRECISE = ("engine.dtype=float32", "quant.optimize=false")
TWO_STAGES = "cluster=local_cpu2"  # so that there is a rank 1 to strike
_MOST_STARTS = 6


@dataclass
class FaultRun:
    """One run with one fault: `victim` gets `number` once `progress` results are there and `delay_seconds` passed."""

    folder: Path
    input: Path
    victim: str
    progress: int
    delay_seconds: float
    number: int = signal.SIGKILL
    options: tuple[str, ...] = ()
    output: str = field(default="", init=False)

    @classmethod
    def of_seed(cls, seed: int, folder: Path, input_file: Path) -> FaultRun:
        """One in six strikes while the pipeline starts, the others while it serves."""
        rng = random.Random(seed)
        if rng.random() < 1 / 6:
            return cls(folder, input_file, rng.choice(VICTIMS), 0, rng.uniform(0.0, 8.0))
        return cls(folder, input_file, rng.choice(VICTIMS), rng.randrange(1, REQUESTS), rng.uniform(0.0, 0.05))

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def command(self) -> Command:
        own = ("run.backoff_seconds=0.2", TWO_STAGES, *PRECISE, *self.options)
        return Command(("run", f"input={self.input}", f"out={self.out}", *own))

    def go(self) -> int:
        """Runs, strikes, and runs again until it ends well; returns how often it was started. Nothing is left over."""
        for start in range(1, _MOST_STARTS + 1):
            command = self.command()
            process = command.start()
            try:
                if start == 1:
                    self.strike(process, command)
                out, err = process.communicate(timeout=240)
            finally:
                process.kill()
                process.communicate()
            self.output += f"--- start {start}, exit code {process.returncode}\n{out[-2000:]}{err[-2000:]}"
            assert gone(command.processes), f"processes were left behind:\n{self.output}"
            if process.returncode == 0:
                return start
        raise AssertionError(f"it did not end well in {_MOST_STARTS} starts:\n{self.output}")

    def strike_with(self, number: int, process: subprocess.Popen, command: Command) -> bool:
        self.number = number
        return self.strike(process, command)

    def strike(self, process: subprocess.Popen, command: Command) -> bool:
        """False if the run ended first."""
        results = self.out / "results.jsonl"
        victim = None
        end = time.monotonic() + 240
        while process.poll() is None:
            assert time.monotonic() < end, "the moment to strike did not come"
            if victim is None or not victim.is_running():
                victim = find_victim(self.victim, process, command)
            if victim is not None and (not self.progress or rows_in(results) >= self.progress):
                time.sleep(self.delay_seconds)
                try:
                    victim.send_signal(self.number)
                except psutil.NoSuchProcess:
                    continue
                return True
            time.sleep(0.005)
        return False


def find_victim(name: str, process: subprocess.Popen, command: Command) -> psutil.Process | None:
    """A process of the run by its part, None if it is not there yet."""
    if name == "run":
        return psutil.Process(process.pid)
    for each in command.processes():
        try:
            line, env = each.cmdline(), each.environ()
        except psutil.Error:
            continue
        launching = next((word for word in line if word.startswith("deepspeed.launcher.")), None)
        if name == "launcher" and launching == "deepspeed.launcher.runner":
            return each
        if name == "host launcher" and launching == "deepspeed.launcher.launch":
            return each
        if launching is None and "ds_llmpq.commands.serve" in line and name == f"rank {env.get('RANK')}":
            return each
    return None


def rows_in(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def write_input(file: Path, requests: int = REQUESTS, longest: int = 24, growth: int = 0) -> Path:
    """So many small requests of unequal lengths; each prompt has 8 to 39 characters and `growth` more than the last."""
    rng = random.Random(5)
    with open(file, "w") as stream:
        for index in range(requests):
            prompt, start = 8 + growth * index, rng.randrange(len(_TEXT) - 40)
            body = {
                "prompt": (_TEXT * (prompt // len(_TEXT) + 2))[start : start + prompt + rng.randrange(32)],
                "max_tokens": rng.randrange(4, longest),
                "ignore_eos": True,
            }
            row = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
            stream.write(json.dumps(row) + "\n")
    return file


def undisturbed(folder: Path, input_file: Path, *options: str) -> dict[str, bytes]:
    """custom_id -> row, of a run to which nothing happens."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = Command(("run", f"input={input_file}", f"out={folder / 'out'}", TWO_STAGES, *PRECISE, *options)).run()
    assert ended.returncode == 0, ended.stderr
    return rows_of(folder / "out")


def rows_of(out: Path) -> dict[str, bytes]:
    """custom_id -> row of results.jsonl, each whole and none twice."""
    data = (out / "results.jsonl").read_bytes()
    assert data.endswith(b"\n"), "the last row is torn"
    lines = data.splitlines()
    rows = {json.loads(line)["custom_id"]: line for line in lines}
    assert len(rows) == len(lines), "a result stands there twice"
    return rows
