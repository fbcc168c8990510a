"""What the planner knows after 1, 3, 10 and 30 seconds, beside programs that keep the processor busy.

    python scripts/bench/anytime.py [--set paper|random|large|all] [--only TEXT] [--busy 2] [--seconds 30]
                                    [--mode MODE] [--cpu]

One line an instance: seconds to the first plan and to the first bound above 0; how far the plan of each moment is above
the last plan, and what is proven of it then. Instances are those of `planner.py`. `--mode` bounds quality loss or
latency by the mean of the fastest and the least lossy plan. `--cpu` counts the planner's own processor time: what a
machine does beside it hardly matters then.
"""

import argparse
import multiprocessing
import os
import time

from planner import SETS

from ds_llmpq.planner import solve
from ds_llmpq.planner.incumbent import relative_gap

MOMENTS = (1.0, 3.0, 10.0, 30.0)


def burn() -> None:
    while True:
        sum(range(10_000))


def state_at(events: list, moment: float) -> tuple[float | None, float]:
    """(objective, bound) known at a moment; `events`: (seconds, event)."""
    known = [event for seconds, event in events if seconds <= moment]
    return (known[-1].incumbent, known[-1].bound or 0.0) if known else (None, 0.0)


def bounded(obj: dict, mode: str) -> dict:
    if mode == "theta":
        return obj
    key = "quality_loss" if mode == "max_quality_loss" else "latency_seconds"
    ends = [
        solve({**obj, "objective": {"mode": "theta", "theta": theta}}, time_limit_seconds=5, baselines=False)
        for theta in (0.0, 1e4)
    ]
    return {**obj, "objective": {"mode": mode, "limit": sum(getattr(plan.predicted, key) for plan in ends) / 2}}


def measure(label: str, obj: dict, seconds: float, in_cpu: bool) -> None:
    events: list = []
    started, cpu_before = time.monotonic(), time.process_time()

    def note(event) -> None:
        events.append((time.process_time() - cpu_before if in_cpu else event.seconds, event))

    plan = solve(obj, time_limit_seconds=seconds, progress=note)
    wall, cpu = time.monotonic() - started, time.process_time() - cpu_before
    first_plan = next(at for at, event in events if event.incumbent is not None)
    first_bound = next((at for at, event in events if event.bound), float("nan"))
    cells = []
    for moment in MOMENTS:
        value, bound = state_at(events, moment)
        if value is None:
            cells.append("none")
        else:
            worse = 100 * (value / plan.solver.objective - 1) if plan.solver.objective else 0.0
            cells.append(f"+{worse:.1f} / {100 * relative_gap(value, bound):.1f}")
    print(
        f"{label:<26}{first_plan:>7.2f}{first_bound:>8.2f}" + "".join(f"{cell:>15}" for cell in cells) +
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
    arguments = parser.parse_args()
    loops = [multiprocessing.Process(target=burn, daemon=True) for _ in range(arguments.busy)]
    for loop in loops:
        loop.start()
    heads = [f"{moment:g} s: +/gap %" for moment in MOMENTS]
    print(f"load average {os.getloadavg()[0]:.1f} before, {os.cpu_count()} processors")
    print(f"{'instance':<26}{'plan s':>7}{'bound s':>8}{''.join(f'{h:>15}' for h in heads)}{'wall s':>8}{'CPU s':>7}")
    try:
        for name in ("paper", "random", "large") if arguments.set == "all" else (arguments.set,):
            for label, obj in SETS[name]():
                if arguments.only in label:
                    measure(label, bounded(obj, arguments.mode), arguments.seconds, arguments.cpu)
    finally:
        for loop in loops:
            loop.terminate()


if __name__ == "__main__":
    main()
