"""The project's own main table, measured: plans of ours beside Uniform's, PipeEdge's, adabits' and a split by memory.

    ds-llmpq profile model=tiny cluster=local_heterogeneous2 workload=demo out=PROFILE
    ds-llmpq sensitivity model=tiny out=SENSITIVITY
    python scripts/measured_table.py OUT planner.profile=PROFILE planner.sensitivity=SENSITIVITY/sensitivity.json \\
        [--memory 18,9 12,12]

Stages are CPU processes of different speeds; a row of `--memory` is the MiB that each may hold. Every baseline
chooses its width and micro-batches on the same profile; against each, ours is the fastest plan whose predicted loss
is no higher. Every plan runs through the real launcher on prompts of the planned length and is evaluated; medians of
runs that take turns. OUT keeps all, and an interrupted table goes on."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from theta_sweep import called, measured, written_prompts

from ds_llmpq import config
from ds_llmpq.errors import InfeasibleError
from ds_llmpq.plan import read_plan
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import make_plan

OTHERS = ("uniform", "pipeedge", "adabits", "memory_proportional")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cluster", default="local_heterogeneous2")
    parser.add_argument("--memory", nargs="+", default=["18,9", "14,14", "40,40"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_intermixed_args()
    out = Path(options.out).absolute()
    rows = [row for memory in options.memory for row in compared(memory, options, out / memory.replace(",", "-"))]
    with open(out / "table.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = format_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
    (out / "table.txt").write_text(text + "\n")
    print(text)
    return 0


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compared(memory: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each baseline that has a plan with so much memory."""
    budgets = [
        f"cluster.hosts.0.devices.{slot}.memory_bytes={int(mib) << 20}" for slot, mib in enumerate(memory.split(","))
    ]
    common = ["model=tiny", "workload=demo", f"cluster={options.cluster}", *budgets, *options.overrides]
    others = planned(common, folder)
    plans: dict[str, dict[str, Any]] = {}
    pairs = []
    for name, entry in others.items():
        loss = entry["plan"].predicted.quality_loss
        bound = ["planner.mode=max_quality_loss", f"planner.max_quality_loss={loss + 1e-9}"]
        own = made([*common, *bound], folder / f"ours_{name}")
        pairs.append((name, kept(entry, plans), kept(own, plans)))
    for repeat in range(options.repeats):
        for entry in plans.values():
            prompts = written_prompts(entry["file"].parent, entry)
            called("run", [f"plan={entry['file']}", f"input={prompts}", f"out={entry['file'].parent / f'run{repeat}'}"])
    for entry in plans.values():
        limited = [f"plan={entry['file']}", "evaluation.limit_tokens=6144"]
        called("evaluate", [*limited, f"out={entry['file'].parent / 'quality'}"])
    return [row(memory, name, measured(a, options.repeats), measured(b, options.repeats)) for name, a, b in pairs]


def planned(common: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """The baselines' plans on the problem that ours solves, of those that have one."""
    found = {}
    for name in OTHERS:
        with contextlib.suppress(InfeasibleError):
            found[name] = made([*common, f"planner.baseline={name}"], folder / name)
    return found


def made(overrides: list[str], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    if not file.is_file():
        make_plan(config.to_object(config.compose_settings("plan", overrides), PlanConfig), folder)
    return {"thetas": [], "plan": read_plan(file), "file": file}


def kept(entry: dict[str, Any], plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The first entry with the same decisions, so that no plan runs twice."""
    plan = entry["plan"]
    same = json.dumps([asdict(plan.micro_batch), [(s.device, s.layers, s.bits) for s in plan.stages]], default=list)
    return plans.setdefault(same, entry)


def row(memory: str, name: str, other: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {
        "MiB": memory,
        "against": name,
        "its bits": other["bits"],
        "our bits": own["bits"],
        "its tokens/s": other["tokens/s"],
        "our tokens/s": own["tokens/s"],
        "speed-up": own["tokens/s"] / other["tokens/s"],
        "its perplexity": other["perplexity"],
        "our perplexity": own["perplexity"],
    }


if __name__ == "__main__":
    sys.exit(main())
