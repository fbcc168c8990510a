"""What the planner knows after 1, 3, 10 and 30 seconds, beside programs that keep the processor busy.

    python scripts/bench/anytime.py [--set paper|random|large|all] [--only TEXT] [--busy 2] [--seconds 30]
                                    [--mode MODE] [--cpu | --command]

One line an instance: seconds to the first plan, to the first that is no worse than every baseline, and to the first
bound above 0; how far the plan of each moment is above the last plan, and what is proven of it then. Instances are
those of `planner.py`. `--mode` bounds quality loss or latency by the mean of the fastest and the least lossy plan.
`--cpu` counts the planner's own processor time: what a machine does beside it hardly matters then. `--command` counts
from the start of `ds-llmpq plan problem=FILE`, imports and reading included.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from planner import SETS

from ds_llmpq.plan import Plan
from ds_llmpq.planner import Problem, evaluate, solve, violations
from ds_llmpq.planner.baselines import all_baselines
from ds_llmpq.planner.incumbent import relative_gap
from ds_llmpq.planner.objective import objective_value

MOMENTS = (1.0, 3.0, 10.0, 30.0)


def burn() -> None:
    while True:
        sum(range(10_000))


@dataclass(frozen=True)
class Moment:
    seconds: float
    objective: float | None  # None: no plan yet
    bound: float


def state_at(moments: list[Moment], seconds: float) -> Moment:
    return max((m for m in moments if m.seconds <= seconds), key=lambda m: m.seconds, default=Moment(0.0, None, 0.0))


def first(moments: list[Moment], holds: Callable[[Moment], bool]) -> float:
    return next((moment.seconds for moment in moments if holds(moment)), float("nan"))


def bounded(obj: dict, mode: str) -> dict:
    if mode == "theta":
        return obj
    key = "quality_loss" if mode == "max_quality_loss" else "latency_seconds"
    ends = [
        solve({**obj, "objective": {"mode": "theta", "theta": theta}}, time_limit_seconds=5, baselines=False)
        for theta in (0.0, 1e4)
    ]
    return {**obj, "objective": {"mode": mode, "limit": sum(getattr(plan.predicted, key) for plan in ends) / 2}}


def solve_here(obj: dict, seconds: float, in_cpu: bool) -> tuple[list[Moment], Plan]:
    moments: list[Moment] = []
    cpu_before = time.process_time()

    def note(event) -> None:
        at = time.process_time() - cpu_before if in_cpu else event.seconds
        moments.append(Moment(at, event.incumbent, event.bound or 0.0))

    return moments, solve(obj, time_limit_seconds=seconds, progress=note)


def solve_by_command(obj: dict, seconds: float) -> tuple[list[Moment], Plan]:
    with tempfile.TemporaryDirectory() as folder:
        problem, out = Path(folder, "problem.json"), Path(folder, "out")
        problem.write_text(json.dumps(obj), encoding="utf-8")
        arguments = [f"problem={problem}", f"out={out}", f"planner.time_limit_seconds={seconds}"]
        child = [sys.executable, str(Path(__file__).with_name("plan_events.py")), repr(time.time()), *arguments]
        found = subprocess.run(child, capture_output=True, text=True, check=True)
        lines = [line for line in found.stderr.splitlines() if line.startswith("[")]
        plan = Plan.from_json(json.loads((out / "plan.json").read_text(encoding="utf-8")))
        return [Moment(*json.loads(line)) for line in lines], plan


def value_baselines(obj: dict) -> float:
    """The least objective of a baseline that keeps the limits."""
    problem = Problem.from_json(obj)
    plans = [found.assignment for found in all_baselines(problem).values() if found.assignment is not None]
    kept = [plan for plan in plans if not violations(problem, plan)]
    return min((objective_value(problem, evaluate(problem, plan)) for plan in kept), default=float("inf"))


def measure(label: str, obj: dict, seconds: float, how: str) -> None:
    started, cpu_before = time.monotonic(), time.process_time()
    moments, plan = solve_by_command(obj, seconds) if how == "command" else solve_here(obj, seconds, how == "cpu")
    wall, cpu = time.monotonic() - started, time.process_time() - cpu_before
    baseline, last = value_baselines(obj), plan.solver.objective
    first_plan = first(moments, lambda m: m.objective is not None)
    no_worse = first(moments, lambda m: m.objective is not None and m.objective <= baseline * (1 + 1e-9))
    first_bound = first(moments, lambda m: m.bound > 0)
    cells = []
    for moment in MOMENTS:
        state = state_at(moments, moment)
        if state.objective is None:
            cells.append("none")
        else:
            worse = 100 * (state.objective / last - 1) if last else 0.0
            cells.append(f"+{worse:.1f} / {100 * relative_gap(state.objective, state.bound):.1f}")
    print(
        f"{label:<26}{first_plan:>7.2f}{no_worse:>9.2f}{first_bound:>8.2f}" + "".join(f"{cell:>15}" for cell in cells) +
        f"{wall:>8.1f}{cpu:>7.1f}  {plan.solver.status}", flush=True
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="all", choices=["paper", "random", "large", "all"])
    parser.add_argument("--only", default="", help="instances whose name holds this text")
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside the planner")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of the planner")
    parser.add_argument("--mode", default="theta", choices=["theta", "max_quality_loss", "max_latency"])
    parser.add_argument("--cpu", action="store_true", help="moments in processor time of the planner")
    parser.add_argument("--command", action="store_true", help="from the start of the command `plan`")
    arguments = parser.parse_args()
    how = "command" if arguments.command else "cpu" if arguments.cpu else "here"
    loops = [multiprocessing.Process(target=burn, daemon=True) for _ in range(arguments.busy)]
    for loop in loops:
        loop.start()
    heads = [f"{moment:g} s: +/gap %" for moment in MOMENTS]
    print(f"load average {os.getloadavg()[0]:.1f} before, {os.cpu_count()} processors")
    columns = "".join(f"{head:>15}" for head in heads)
    print(f"{'instance':<26}{'plan s':>7}{'no worse':>9}{'bound s':>8}{columns}{'wall s':>8}{'CPU s':>7}")
    try:
        for name in ("paper", "random", "large") if arguments.set == "all" else (arguments.set,):
            for label, obj in SETS[name]():
                if arguments.only in label:
                    measure(label, bounded(obj, arguments.mode), arguments.seconds, how)
    finally:
        for loop in loops:
            loop.terminate()


if __name__ == "__main__":
    main()
