"""`simulate`: runs the same jobs under several scheduling policies, or the published simulator on given cases."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ds_llmpq import config
from ds_llmpq.errors import UserError
from ds_llmpq.files import write_json
from ds_llmpq.plan import read_plan
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.research.config import ExecutionConfig, SimulateConfig
from ds_llmpq.research.published_ssjf import compute_published_ratios, read_cases, schedules
from ds_llmpq.research.queue_simulator import Server, measure_schedule, simulate
from ds_llmpq.research.scenario import make_jobs
from ds_llmpq.scheduler.execution import ConstantCost, ExecutionCost, PlanCost
from ds_llmpq.scheduler.policies import Guard
from ds_llmpq.wording import format_number, pluralize

MODES = ("right", "reference")
_SHOWN = {
    "jct_mean_seconds": "JCT mean, s",
    "jct_p50_seconds": "p50, s",
    "jct_p99_seconds": "p99, s",
    "waiting_mean_seconds": "waiting mean, s",
    "makespan_seconds": "makespan, s",
    "throughput_jobs_per_second": "jobs/s",
    "padded_token_share": "share of padding",
}


def run(settings: SimulateConfig, out: Path) -> int:
    if settings.mode not in MODES:
        raise UserError(f"mode is {settings.mode!r} but must be one of {', '.join(MODES)}.")
    return _reference(settings, out) if settings.mode == "reference" else _right(settings, out)


def _reference(settings: SimulateConfig, out: Path) -> int:
    if settings.cases is None:
        raise UserError("mode=reference needs cases=FILE, a JSON list of published cases.")
    found = [schedules(case) for case in read_cases(config.make_absolute(settings.cases))]
    write_json(out / "completions.json", found)
    print(f"{pluralize(len(found), 'case')}: {out / 'completions.json'}")
    return 0


def _right(settings: SimulateConfig, out: Path) -> int:
    if not settings.policies or settings.repeats < 1:
        raise UserError("There is nothing to run; give at least one of policies and repeats=1 or more.")
    cost = build_execution_cost(settings.execution)
    runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in settings.policies}
    published = []
    server = Server(settings.batching, settings.max_batch, settings.batch_wait_seconds)
    guard = Guard(**asdict(settings.guard))
    for seed in range(settings.seed, settings.seed + settings.repeats):
        jobs, lengths = make_jobs(settings, cost, seed)
        for policy in runs:
            schedule = simulate(jobs, cost, policy, server, guard, settings.prediction.latency_seconds)
            runs[policy].append(measure_schedule(jobs, schedule))
        if settings.published:
            published.append(compute_published_ratios(jobs, lengths, settings.batching, settings.max_batch))
    metrics = {policy: _mean(rows) for policy, rows in runs.items()}
    ratios = _mean(published) if published and published[0] else None
    record = {"schema": 1, "settings": asdict(settings), "policies": metrics, "published": ratios}
    write_json(out / "metrics.json", record)
    rows = [[policy, *(format_number(found[name], 4) for name in _SHOWN)] for policy, found in metrics.items()]
    print(format_table(["policy", *_SHOWN.values()], rows))
    print(f"metrics: {out / 'metrics.json'}")
    return 0


def build_execution_cost(execution: ExecutionConfig) -> ExecutionCost:
    if execution.kind == "constant":
        return ConstantCost(execution.constant_seconds, execution.per_token_seconds)
    if execution.kind != "plan":
        raise UserError(f"execution.kind is {execution.kind!r} but must be constant or plan.")
    if execution.plan is None:
        raise UserError("execution.kind=plan needs execution.plan=FILE, a plan.json.")
    return PlanCost.from_plan(read_plan(config.make_absolute(execution.plan)))


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
