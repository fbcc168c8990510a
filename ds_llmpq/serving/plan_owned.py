"""Keys that a finished plan decides, given beside it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from ds_llmpq.plan import Plan
from ds_llmpq.planner.config import CostConfig, PlannerConfig, WorkloadConfig
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.serving.config import RunConfig


def note_ignored(settings: RunConfig, plan: Plan) -> None:
    """One line on stderr that names the keys which `plan=FILE` decides, where they were given other values."""
    if names := find_ignored(settings, plan):
        print(f"note: {settings.plan} decides, and so these have no effect: {', '.join(names)}.", file=sys.stderr)


def find_ignored(settings: RunConfig, plan: Plan) -> list[str]:
    """Dotted keys whose values are neither the defaults nor the plan's. A run that may plan again, because of
    `run.on_loss=replan`, reads the planner's and the cost model's keys."""
    owned: list[tuple[str, Any, dict[str, Any]]] = [
        ("quant", QuantConfig(), asdict(plan.quant.to_config()) if plan.quant else {}),
        ("workload", WorkloadConfig(), asdict(plan.workload)),
    ]
    if getattr(settings.run, "on_loss", "stop") != "replan":
        owned += [("planner", PlannerConfig(), {}), ("cost", CostConfig(), {})]
    return [
        f"{group}.{name}"
        for group, defaults, planned in owned
        for name, default in asdict(defaults).items()
        if (value := asdict(getattr(settings, group))[name]) != default and value != planned.get(name, default)
    ]
