"""Damaged and hostile inputs for every loader: only a result or one sentence may come of each.

    python scripts/fuzz.py [--count N] [--seed N] [--processes N] [--summary FILE] [LOADER ...]

First what any file can be instead of itself, and each place of each valid file with each odd value; then, up to
`--count`, files damaged at random, each from its number alone: a finding repeats with `--count 1 --seed NUMBER --random
LOADER`. Exit code 1, and the traceback of each kind of finding, where a loader raises anything else than a refusal,
takes longer than 10 s, or writes a file, starts a program or opens a connection that it should not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from loaders import Guard, Loader, all_loaders, try_input  # noqa: E402

HANG_SECONDS = 10


class Hang(BaseException):
    """A loader took too long. No Exception: nothing that a loader catches."""


@dataclass
class Found:
    """What came of the inputs of one process. `kinds`: kind of finding -> times; `first`: its first case and place."""

    outcomes: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, case: str, frames: list[str]) -> None:
        self.kinds[kind] += 1
        self.first.setdefault(kind, "\n".join([case, *frames]))

    def add(self, other: Found) -> None:
        for mine, theirs in ((self.outcomes, other.outcomes), (self.seconds, other.seconds), (self.kinds, other.kinds)):
            mine.update(theirs)
        self.first = other.first | self.first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--random", action="store_true", help="leave the places out")
    parser.add_argument("--summary", type=Path, help="where the figures go as JSON")
    parser.add_argument("loaders", nargs="*")
    options = parser.parse_args()
    started, found = time.monotonic(), Found()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for part in pool.imap_unordered(_share, [(options, number) for number in range(options.processes)]):
            found.add(part)
    report = {
        "inputs": sum(found.outcomes.values()),
        "findings": dict(found.kinds.most_common()),
        "outcomes": dict(sorted(found.outcomes.items())),
        "seconds": round(time.monotonic() - started, 1),
        "seconds_by_loader": {name: round(spent, 1) for name, spent in sorted(found.seconds.items())},
    }
    for kind, what in found.first.items():
        print(f"--- {found.kinds[kind]} times {kind}\n{what}")
    print(json.dumps(report, indent=1))
    if options.summary:
        options.summary.write_text(json.dumps(report, indent=1) + "\n")
    return min(len(found.kinds), 1)


def _share(work: tuple[argparse.Namespace, int]) -> Found:
    """Every n-th of the inputs, in a process of its own."""
    options, mine = work
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "input"
        loaders = all_loaders(Path(name) / "valid")
        loaders = {name: loaders[name] for name in options.loaders or loaders}
        for loader_name, loader in loaders.items():  # what is imported on first use is no finding
            outcome = "ok" if not loader.seed else try_input(loader, loader.seed, folder)
            if outcome != "ok":
                raise RuntimeError(f"the valid input of {loader_name} is refused: {outcome}")
        guard = Guard(folder)
        for number, (loader_name, case, data) in enumerate(_inputs(loaders, options)):
            if number % options.processes == mine:
                _try(loader_name, loaders[loader_name], case, data, folder, guard, found)
    return found


def _inputs(loaders: dict[str, Loader], options: argparse.Namespace) -> Iterator[tuple[str, str, bytes]]:
    """(loader, name of the case, file) up to the count."""
    left = options.count
    if not options.random:
        for name, loader in loaders.items():
            for number, data in enumerate(loader.all_inputs()):
                if left == 0:
                    return
                left -= 1
                yield name, f"{name}, place {number}", data
    names = [name for name, loader in loaders.items() for _ in range(loader.weight)]
    for number in range(options.seed, options.seed + left):
        rng = random.Random(number)
        name = rng.choice(names)
        yield name, f"{name}, seed {number}", loaders[name].mutate(rng, loaders[name].seed)


def _try(name: str, loader: Loader, case: str, data: bytes, folder: Path, guard: Guard, found: Found) -> None:
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        with guard:
            outcome = try_input(loader, data, folder)
        found.outcomes[f"{name}: {'taken' if outcome == 'ok' else 'refused'}"] += 1
    except BaseException as error:  # a panic of a Rust extension is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        kind = f"{name}: {type(error).__name__} in {Path(frames[-1].filename).name}:{frames[-1].lineno}"
        said = f"{case}: {str(error)[:200]!r} for {data[:150]!r}"
        found.note(kind, said, [f"      {frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-6:]])
        found.outcomes[f"{name}: found"] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for what in guard.found:
        found.note(f"{name}: {what}", case, [])
    guard.found.clear()
    found.seconds[name] += time.monotonic() - started


def _too_long(*_: object) -> None:
    raise Hang(f"not done after {HANG_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
