"""A long run with faults: nothing is lost, memory stays level, and no process, port or descriptor is left over.

    python scripts/soak.py --minutes 20 --requests 200000 --kill-seconds 60 --out DIR

One batch of short requests, at default settings. So often one of its processes is killed, as long as the minutes last;
then it may end. A line a sample gives the resident memory of `run` and of each rank. At the end a tenth of the results
is taken away, and the time until the same command writes its first row is measured. The exit code is 1 unless every
row is there once, no process of the batch is left over (and so no port), nothing but a killed `run` was started by
hand, and the memory of each process that served for a minute or more is within a twentieth of what it was after a
quarter of that time (the median of the last tenth counts). DIR gets soak.json and the log.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import psutil

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from harness import VICTIMS, find_victim, rows_in, rows_of, write_input  # noqa: E402
from launching import Command, gone  # noqa: E402

SAMPLE_SECONDS = 2.5
_MIB = 1 << 20
_MOST_GROWTH = 1.05
_SHORTEST_LIFE = 16  # samples while serving, of a process whose growth is judged
_LONGEST_ANSWER = 6  # tokens, less one: many rows matter here, not many tokens


class Soak:
    """A batch, kills, and by process the samples of its resident bytes while results came."""

    def __init__(self, options: argparse.Namespace):
        self.out, self.options = options.out / "run", options
        self.log = open(options.out / "log", "a")  # noqa: SIM115 -- until the process ends
        rows = write_input(options.out / "rows.jsonl", options.requests, longest=_LONGEST_ANSWER)
        self.arguments = ("run", "+experiment=demo", f"input={rows}", f"out={self.out}")
        self.samples: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.rng = random.Random(0)
        self.kills: dict[str, int] = defaultdict(int)
        self.commands = self.results = 0
        self.run_killed = False

    def say(self, text: str) -> None:
        for stream in (self.log, sys.stdout):
            print(f"{time.strftime('%H:%M:%S')} {text}", file=stream, flush=True)

    def serve(self) -> None:
        """The batch, killed now and then, until all its results are there."""
        began = time.monotonic()
        end, strike = began + self.options.minutes * 60, began + self.options.kill_seconds
        code = None
        while code != 0:
            command = self._command()
            with open(self.options.out / "output", "ab") as output:
                process = command.start(output)
            self.run_killed = False
            while (code := process.poll()) is None:
                self._sample(process, command)
                if strike < time.monotonic() < end:
                    strike += self.options.kill_seconds
                    self._kill(process, command)
                time.sleep(SAMPLE_SECONDS)
            if code != 0 and not self.run_killed:
                raise AssertionError(f"run ended with code {code} though it was not killed")
        self._check()
        self.say(f"{self.options.requests} results after {time.monotonic() - began:.0f} s")

    def resume_seconds(self, done: float = 0.9) -> dict[str, float]:
        """Takes results away until only so many are done, and times the same command: first new row, and end."""
        results = self.out / "results.jsonl"
        lines = results.read_bytes().splitlines(keepends=True)
        kept = int(done * len(lines))
        results.write_bytes(b"".join(lines[:kept]))
        del lines
        command, began, first = self._command(), time.monotonic(), None
        with open(self.options.out / "output", "ab") as output:
            process = command.start(output)
        while (code := process.poll()) is None:
            if first is None and rows_in(results) > kept:
                first = time.monotonic() - began
            time.sleep(0.2)
        if code != 0:
            raise AssertionError(f"going on after {done:.0%} ended with code {code}")
        self._check()
        return {"done": done, "first_row_seconds": first, "end_seconds": time.monotonic() - began}

    def growth(self) -> list[dict[str, object]]:
        """Processes that served long: resident MiB after a quarter of that time, at its end, and at most."""
        return [
            {
                "process": name,
                "samples": len(values),
                "quarter_mib": round(values[len(values) // 4] / _MIB, 1),
                "last_mib": round(_last(values) / _MIB, 1),
                "most_mib": round(max(values) / _MIB, 1),
                "level": _last(values) <= values[len(values) // 4] * _MOST_GROWTH,
            }
            for (name, _), values in self.samples.items()
            if len(values) >= _SHORTEST_LIFE
        ]

    def _command(self) -> Command:
        self.commands += 1
        return Command(self.arguments)

    def _kill(self, process, command) -> None:
        name = self.rng.choice(VICTIMS)
        if (victim := find_victim(name, process, command)) is not None:
            victim.kill()
            self.kills[name] += 1
            self.run_killed |= name == "run"
            self.say(f"killed {name}, {rows_in(self.out / 'results.jsonl')} results are there")

    def _check(self) -> None:
        if len(rows_of(self.out)) != self.options.requests:
            raise AssertionError(f"{len(rows_of(self.out))} results instead of {self.options.requests}")
        mark = f"out={self.out}"
        if not gone(lambda: [each for each in psutil.process_iter(["cmdline"]) if _names(each, mark, self.out)]):
            raise AssertionError("processes were left behind")

    def _sample(self, process, command) -> None:
        found = []
        before, self.results = self.results, rows_in(self.out / "results.jsonl")
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
        self.say(f"{self.results} results, {', '.join(found)}")


def _last(values: list[int]) -> float:
    """Of the last tenth: a process that ends holds its trace and its reports once more, while it writes them."""
    return median(values[-max(1, len(values) // 10) :])


def _names(process: psutil.Process, mark: str, out: Path) -> bool:
    words = process.info["cmdline"] or []
    return mark in words or any(str(out / "hostfile") in word for word in words)


def main() -> int:
    options = _options()
    soak = Soak(options)
    problem, resumed = "", None
    try:
        soak.serve()
        resumed = soak.resume_seconds()
    except AssertionError as error:
        problem = str(error)
    growth = soak.growth()
    report = {
        "requests": options.requests,
        "kills": dict(soak.kills),
        "commands": soak.commands,
        "resumed": resumed,
        "memory": growth,
        "problem": problem,
    }
    (options.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    soak.say(json.dumps(report))
    return 1 if problem or not all(entry["level"] for entry in growth) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="as long something is killed")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--kill-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
