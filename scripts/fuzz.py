"""Damaged and hostile inputs for every loader: only a result or one sentence may come of each.

    python scripts/fuzz.py [COUNT] [SEED] [LOADER ...]      # 10000 inputs from seed 0 over all loaders

Each input is made from its number alone, so a finding repeats with `scripts/fuzz.py 1 NUMBER LOADER`. Exit code 1, and
the traceback of each kind of finding, where a loader raises anything else than a refusal, takes longer than its bound,
or writes a file, starts a program or opens a connection that it should not.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from loaders import Guard, all_loaders, try_input  # noqa: E402

HANG_SECONDS = 20.0


def main() -> int:
    count, first = (int(value) for value in (sys.argv[1:3] + ["10000", "0"][len(sys.argv[1:3]) :]))
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = all_loaders(folder / "valid")
        if sys.argv[3:]:
            loaders = {name: loaders[name] for name in sys.argv[3:]}
        for loader_name, loader in loaders.items():  # what is imported on first use is no finding
            outcome = "ok" if not loader.seed else try_input(loader, loader.seed, folder / "input")
            if outcome != "ok":
                sys.exit(f"the valid input of {loader_name} is refused: {outcome}")
        return fuzz(loaders, folder / "input", count, first)


def fuzz(loaders, folder: Path, count: int, first: int) -> int:
    """Prints what came of it, by loader; returns the number of kinds of findings."""
    names = [name for name, loader in loaders.items() for _ in range(loader.weight)]
    outcomes: dict[str, Counter] = {name: Counter() for name in loaders}
    findings: Counter = Counter()
    seconds: Counter = Counter()
    guard = Guard(folder)
    for number in range(first, first + count):
        rng = random.Random(number)
        name = rng.choice(names)
        data = loaders[name].mutate(rng, loaders[name].seed)
        started = time.monotonic()
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            with guard:
                outcome = try_input(loaders[name], data, folder)
            outcomes[name]["taken" if outcome == "ok" else "refused"] += 1
        except BaseException as error:  # a panic of a Rust extension is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{name}: {type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
            outcomes[name]["found"] += 1
            findings[kind] += 1
            if findings[kind] == 1:
                print(f"--- input {number}: {kind}: {str(error)[:200]}")
                for frame in traceback.extract_tb(error.__traceback__)[-6:]:
                    print(f"      {frame.filename}:{frame.lineno} {frame.name}")
        for what in guard.found:
            findings[f"{name}: {what}"] += 1
            print(f"--- input {number}: {name}: {what}")
        guard.found.clear()
        faulthandler.cancel_dump_traceback_later()
        seconds[name] += time.monotonic() - started
    for name, counter in outcomes.items():
        print(f"{name:12} {sum(counter.values()):6} inputs {dict(counter)} in {seconds[name]:.1f} s")
    print(f"{count} inputs, {len(findings)} kinds of findings")
    for kind, times in findings.most_common():
        print(f"  {times:5} {kind}")
    return min(len(findings), 1)


if __name__ == "__main__":
    sys.exit(main())
