"""A long run with faults: memory stays level, and no process, port or descriptor is left over.

    python scripts/soak.py [MINUTES] [LOG]        # 20 minutes

Batches of 10,000 requests follow one another; every few minutes one of their processes is killed. A line a sample gives
the resident memory of `run` and of each rank. At the end: every batch complete, memory of each process that served for
two minutes within a twentieth of what it was after a quarter of that time, no process of a batch left over (and so no
port). The exit code is 1 where that does not hold.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from harness import VICTIMS, FaultRun, find_victim, rows_in, rows_of, write_input  # noqa: E402
from launching import gone  # noqa: E402

REQUESTS = 10_000
SAMPLE_SECONDS = 5.0
_MIB = 1 << 20
_MOST_GROWTH = 1.05
_SHORTEST_LIFE = 24  # samples while serving, of a process whose growth is judged


class Soak:
    """Batches, kills, and by process the samples of its resident bytes while results came."""

    def __init__(self, log, minutes: float):
        self.log, self.end = log, time.monotonic() + minutes * 60
        self.samples: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.rng = random.Random(0)
        self.kills = self.batches = self.starts = self.results = 0

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.log, flush=True)

    def batch(self, folder: Path, rows: Path) -> None:
        """One batch, killed now and then, until all its results are there."""
        run = FaultRun(folder, rows, "run", 0, 0.0, options=("run.restarts=5",))
        strike = time.monotonic() + self.rng.uniform(90, 240)
        code = None
        while code != 0:
            command = run.command()
            self.starts += 1
            with open(folder / "output", "ab") as output:
                process = command.start(output)
            while (code := process.poll()) is None:
                self.sample(process, command, run)
                if time.monotonic() > strike:
                    strike = time.monotonic() + self.rng.uniform(90, 240)
                    name = self.rng.choice(VICTIMS)
                    if (victim := find_victim(name, process, command)) is not None:
                        victim.kill()
                        self.kills += 1
                        self.say(f"killed {name}, {rows_in(run.out / 'results.jsonl')} results are there")
                time.sleep(SAMPLE_SECONDS)
            if not gone(command.processes):
                raise AssertionError("processes were left behind")
        if len(rows_of(run.out)) != REQUESTS:
            raise AssertionError(f"{len(rows_of(run.out))} results instead of {REQUESTS}")
        self.batches += 1

    def sample(self, process, command, run: FaultRun) -> None:
        found = []
        before, self.results = self.results, rows_in(run.out / "results.jsonl")
        for name in ("run", "rank 0", "rank 1"):
            victim = find_victim(name, process, command)
            try:
                memory = victim.memory_info().rss if victim is not None else None
            except psutil.Error:
                memory = None
            if memory is not None:
                if self.results > before:
                    self.samples[name, victim.pid].append(memory)
                found.append(f"{name} {memory / _MIB:.0f} MiB")
        self.say(f"batch {self.batches}: {self.results} results, {', '.join(found)}")

    def growth(self) -> list[str]:
        """Processes that lived long and grew: (name, pid), from a quarter of their life to its end."""
        grown = []
        for (name, pid), values in self.samples.items():
            if len(values) >= _SHORTEST_LIFE:
                first, last = values[len(values) // 4], values[-1]
                self.say(f"{name} ({pid}), {len(values)} samples: {first / _MIB:.0f} to {last / _MIB:.0f} MiB")
                if last > first * _MOST_GROWTH:
                    grown.append(name)
        return grown


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    with open(sys.argv[2] if len(sys.argv) > 2 else "/dev/stdout", "a") as log, tempfile.TemporaryDirectory() as name:
        soak, folder = Soak(log, minutes), Path(name)
        rows = write_input(folder / "rows.jsonl", REQUESTS, longest=48)
        while time.monotonic() < soak.end:
            (folder / str(soak.batches)).mkdir()
            soak.batch(folder / str(soak.batches), rows)
        grown = soak.growth()
        soak.say(
            f"{soak.batches} batches of {REQUESTS} requests, {soak.kills} kills, {soak.starts} starts of run; "
            f"grown: {', '.join(grown) or 'none'}"
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
