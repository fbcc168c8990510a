"""The front of latency against quality loss: one plan for each of several bounds on the loss."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Plan
from ds_llmpq.planner.problem import Objective, Problem
from ds_llmpq.planner.solve import solve


def pareto(
    problem: Problem | Mapping[str, Any], *, points: int = 9, time_limit_seconds: float = 60.0, **options: Any
) -> list[Plan]:
    """The front of latency against quality loss: up to `points` undominated plans, the fastest first.

    Between the fastest and the least lossy plan the bound on quality loss is lowered geometrically; every plan is
    optimal to the gap for its own bound. The time limit is shared by the points.
    """
    problem = problem if isinstance(problem, Problem) else Problem.from_json(problem)
    share = time_limit_seconds / max(points, 2)
    options = {"baselines": False, **options, "time_limit_seconds": share}
    fastest = solve(replace(problem, objective=Objective("theta", theta=0.0)), **options)
    best = solve(replace(problem, objective=Objective("theta", theta=_steep(problem, fastest))), **options)
    plans = [fastest]
    high, low = fastest.predicted.quality_loss, best.predicted.quality_loss
    floor = max(low, 1e-3 * high)
    for i in range(1, points - 1):
        limit = high * (floor / high) ** (i / (points - 1)) if high > 0 else 0.0
        bounded = replace(problem, objective=Objective("max_quality_loss", limit=limit))
        try:
            plans.append(solve(bounded, **options))
        except UserError:
            continue  # no plan found below this bound within the share of time
    plans.append(best)
    return _drop_dominated(plans)


def _drop_dominated(plans: list[Plan]) -> list[Plan]:
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda p: (p.predicted.latency_seconds, p.predicted.quality_loss)):
        if not kept or plan.predicted.quality_loss < kept[-1].predicted.quality_loss:
            kept.append(plan)
    return kept


def _steep(problem: Problem, fastest: Plan) -> float:
    """A theta at which quality loss counts a thousand times more than latency."""
    span = sum(max(row) - min(row) for row in problem.sensitivity)
    return 1e3 * fastest.predicted.latency_seconds / span if span > 0 else 1.0
