"""A plan made by hand, checked and costed as a planned one is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Assignment, Plan, SolverReport, Stage
from ds_llmpq.planner.baselines import all_baselines
from ds_llmpq.planner.deploy import compose_plan
from ds_llmpq.planner.explain import explain_plan
from ds_llmpq.planner.objective import evaluate, objective_value, violations
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.solve import PROVENANCE


def check_plan(problem: Problem | Mapping[str, Any], plan: Plan | Assignment | Mapping[str, Any]) -> Plan:
    """A plan made by hand, validated by the independent checker and costed with the same formula.

    `plan` is a `Plan`, the parsed `plan.json`, or an `Assignment`. Raises `UserError` naming every rule it breaks.
    """
    problem = problem if isinstance(problem, Problem) else Problem.from_json(problem)
    if isinstance(plan, Mapping):
        plan = Plan.from_json(plan)
    assignment = plan if isinstance(plan, Assignment) else plan.assignment()
    broken = violations(problem, assignment)
    if broken:
        raise UserError("The plan cannot be used: " + " ".join(broken))
    prediction = evaluate(problem, assignment)
    report = SolverReport("check", objective_value(problem, prediction), None, None, 0.0, "checked")
    checked = compose_plan(problem, assignment, prediction, report)
    if isinstance(plan, Plan):
        kept = {(s.device, s.layers): s for s in plan.stages}
        stages = tuple(_copy_placement(kept[s.device, s.layers], s) for s in checked.stages)
        checked = replace(checked, model=plan.model, stages=stages, quant=plan.quant, deployment=plan.deployment)
    checked = replace(
        checked,
        baselines={name: b.outcome for name, b in all_baselines(problem).items()},
        provenance=plan.provenance if isinstance(plan, Plan) else PROVENANCE,
    )
    return replace(checked, explanation=tuple(explain_plan(problem, checked)))


def _copy_placement(kept: Stage, stage: Stage) -> Stage:
    """The stage with what the plan given said of where and how it runs."""
    names = ("rank", "host", "kernel", "kind", "slot", "threads", "cpu_share")
    return replace(stage, **{name: getattr(kept, name) for name in names})
