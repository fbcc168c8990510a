"""The paper's main table beside ours: published tokens/s, our predictions, and what the baselines' micro-batches do.

    ds-llmpq plan -m +experiment=paper 'cluster=glob(cluster*)' cost.source=published out=runs/paper
    ds-llmpq plan -m ... workload=paper_latency cluster=cluster1,cluster4,cluster6      likewise, into the same folder
    python scripts/paper_table.py runs/paper

A baseline is costed twice on the same problem: at the micro-batches that suit it best, as `plan` prints it, and at the
one that LLM-PQ gives it, ceil(B / N) in both phases. Prints markdown; no figure here was measured by this project.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from ds_llmpq.plan import PredictedTotals, read_plan
from ds_llmpq.planner import Problem
from ds_llmpq.planner.baselines import all_baselines
from ds_llmpq.planner.problem import MicroBatchCandidates
from ds_llmpq.report import sweep

# cluster and workload -> published tokens/s of PipeEdge, Uniform, adabits, LLM-PQ; None: it crashed or was not shown
PUBLISHED = {
    "cluster1": (11.8, 11.8, 25.8, 83.5),
    "cluster2": (130.6, 131.5, 161.5, 173.6),
    "cluster3": (31.1, 3.0, 29.9, 32.0),
    "cluster4": (6.0, None, 18.3, 22.1),
    "cluster5": (None, None, 9.9, 12.9),
    "cluster6": (39.4, 6.1, 39.2, 41.0),
    "cluster7": (3.8, None, 10.0, 10.7),
    "cluster8": (3.2, None, 10.3, 11.7),
    "cluster9": (2.7, 2.7, 3.3, 5.5),
    "cluster10": (29.9, 5.5, 30.2, 32.7),
    "cluster11": (21.9, 3.0, 21.9, 22.3),
    "cluster1_latency": (None, 137.8, 193.1, 198.0),
    "cluster4_latency": (31.7, 21.0, 32.6, 38.1),
    "cluster6_latency": (48.6, 40.0, 70.5, 79.3),
}
NAMES = ("pipeedge", "uniform", "adabits")


def main() -> None:
    points = [(name, place) for place in sweep.list_points(Path(sys.argv[1])) if (name := _name(place)) in PUBLISHED]
    if not points:
        sys.exit(f"error: {sys.argv[1]} holds no plan of a cluster experiment; see --help in the file's first lines")
    print("| experiment | PipeEdge: published / best / fixed | Uniform | adabits | LLM-PQ, ours |\n|-|-|-|-|-|")
    ratios: dict[str, list[float]] = {}
    for name, place in sorted(points, key=lambda point: list(PUBLISHED).index(point[0])):
        plan = read_plan(place / "plan.json")
        ours = plan.predicted.throughput_tokens_per_second
        best = {n: _speed(plan.baselines[n]) for n in NAMES}
        fixed = at_fixed_micro_batch(Problem.from_json(json.loads((place / "problem.json").read_text())))
        published = dict(zip((*NAMES, "ours"), PUBLISHED[name], strict=True))
        cells = [" / ".join(_cell(value) for value in (published[n], best[n], fixed[n])) for n in NAMES]
        print(f"| {name} | {' | '.join(cells)} | {_cell(published['ours'])} / {_cell(ours)} |")
        for n in NAMES:
            for kind, theirs in (("best", best[n]), ("fixed", fixed[n])):
                if theirs:
                    ratios.setdefault(f"ours over {n}, {kind}", []).append(ours / theirs)
            if published[n]:
                ratios.setdefault(f"published LLM-PQ over {n}", []).append(published["ours"] / published[n])
    print("\n| speed-up | mean | geometric mean | median | of |\n|-|-|-|-|-|")
    for name, values in sorted(ratios.items()):
        geometric = math.exp(sum(map(math.log, values)) / len(values))
        middle = sorted(values)[len(values) // 2]
        print(f"| {name} | {sum(values) / len(values):.2f} | {geometric:.2f} | {middle:.2f} | {len(values)} |")


def at_fixed_micro_batch(problem: Problem) -> dict[str, float | None]:
    """tokens/s of the baselines with ceil(B / N) sequences, or the next larger candidate, in both phases."""
    wanted = -(-problem.workload.sequences // len(problem.devices))
    size = min(s for s in problem.micro_batches.decode if s >= wanted)
    found = all_baselines(replace(problem, micro_batches=MicroBatchCandidates((size,), (size,))))
    return {name: _speed(found[name].outcome) for name in NAMES}


def _name(place: Path) -> str:
    overrides = sweep.read_point(place)["overrides"]
    latency = "_latency" if overrides.get("workload") == "paper_latency" else ""
    return overrides.get("cluster", place.name) + latency


def _speed(entry: PredictedTotals | str) -> float | None:
    return entry.throughput_tokens_per_second if isinstance(entry, PredictedTotals) else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
