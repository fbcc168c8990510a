"""Random kill -9 of a rank, a launcher or the run itself, many times: after it nothing is lost and nothing doubled.

    python scripts/fault_runs.py [RUNS] [FIRST_SEED] [LOG]

Each run serves 200 requests on the shipped model; its seed picks the victim and the moment. Afterwards the same command
is started again until it ends well, and its results must be exactly those of an undisturbed run, byte by byte. Prints a
line a run; the exit code is the number of runs that failed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from harness import FaultRun, rows_of, undisturbed, write_input  # noqa: E402


def main() -> int:
    runs, first = (int(value) for value in (sys.argv[1:3] + ["50", "0"][len(sys.argv[1:3]) :]))
    failed = 0
    with open(sys.argv[3] if len(sys.argv) > 3 else "/dev/stdout", "a") as log, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_input(folder / "rows.jsonl")
        expected = undisturbed(folder / "undisturbed", rows)
        for seed in range(first, first + runs):
            (folder / str(seed)).mkdir()
            run = FaultRun.of_seed(seed, folder / str(seed), rows)
            started = time.monotonic()
            try:
                starts = run.go()
                found = rows_of(run.out)
                assert found.keys() == expected.keys(), f"{len(expected.keys() - found.keys())} results are lost"
                changed = [name for name in expected if expected[name] != found[name]]
                assert not changed, f"{len(changed)} texts differ, the first is that of {changed[0]}"
                outcome = f"ok: {len(found)} results after {starts} starts"
            except AssertionError as error:
                failed += 1
                outcome = f"FAILED: {error}"
            when = f"after {run.progress} results" if run.progress else f"{run.delay_seconds:.1f} s after it appeared"
            seconds = time.monotonic() - started
            print(f"seed {seed}: kill -9 of {run.victim} {when}: {outcome}, {seconds:.0f} s", file=log, flush=True)
        print(f"{runs} runs, {failed} failed", file=log, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
