"""Random kills over all processes and phases of small runs, at default settings: what holds after each.

    python scripts/kill_runs.py --runs 100 --out DIR [--first SEED] [--jobs N] [--requests N]

Each seed picks one or two of `run`, DeepSpeed's runner, its per-host launcher and the ranks; SIGKILL, SIGTERM or
SIGSTOP for each; and a phase: while the pipeline starts, while it serves, in a drain, in a run that goes on after a
drain, or in a start after a restart. Nothing is started by hand but the same command after `run` itself was struck.
After each: every id exactly once over both files, `finished` never earlier, no process left over; and how many answers
equal those of an undisturbed run. DIR gets kills.json, and the folders of what failed. The exit code is 1 if any did.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from kills import KillRun, Outcome, Strike, as_record, is_sampled, prepare  # noqa: E402


def main() -> int:
    options = _options()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    arguments, expected = prepare(folder, options.requests)
    sampled = sum(map(is_sampled, expected))

    def strike(seed: int) -> Outcome:
        own = folder / str(seed)
        own.mkdir()
        run = KillRun(own, arguments, options.requests, Strike.of_seed(seed, options.requests))
        run.outcome.seed = seed
        outcome = run.go(expected)
        if not outcome.problem:
            shutil.rmtree(own)
        print(_line(outcome, len(expected) - sampled, sampled), flush=True)
        return outcome

    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(strike, range(options.first, options.first + options.runs)))
    summary = _summary(outcomes, len(expected) - sampled, sampled)
    report = {"summary": summary, "runs": [as_record(outcome) for outcome in outcomes]}
    (folder / "kills.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in summary.items()))
    return 1 if summary["failed"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--requests", type=int, default=120, help="rows of each run")
    return parser.parse_args()


def _line(outcome: Outcome, greedy: int, sampled: int) -> str:
    how = outcome.problem or (
        f"ok, codes {outcome.codes}, {outcome.restarts} restarts, equal: {outcome.greedy_equal} of {greedy} greedy, "
        f"{outcome.sampled_equal} of {sampled} sampled"
    )
    missed = "" if outcome.struck else " (it ended first)"
    return f"seed {outcome.seed}: {outcome.strike}{missed}: {how}, {outcome.seconds:.0f} s"


def _summary(outcomes: list[Outcome], greedy: int, sampled: int) -> dict[str, object]:
    good = [outcome for outcome in outcomes if not outcome.problem]
    return {
        "runs": len(outcomes),
        "struck": sum(outcome.struck for outcome in outcomes),
        "failed": len(outcomes) - len(good),
        "runs_with_all_greedy_answers_equal": sum(outcome.greedy_equal == greedy for outcome in good),
        "runs_with_all_sampled_answers_equal": sum(outcome.sampled_equal == sampled for outcome in good),
        "greedy_answers_equal": f"{sum(outcome.greedy_equal for outcome in good)} of {greedy * len(good)}",
        "sampled_answers_equal": f"{sum(outcome.sampled_equal for outcome in good)} of {sampled * len(good)}",
        "commands": sum(len(outcome.codes) for outcome in outcomes),
        "restarts": sum(outcome.restarts for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes)),
    }


if __name__ == "__main__":
    sys.exit(main())
