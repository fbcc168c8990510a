"""The planner room: a problem goes in, a plan with a proven bound comes out. Imports neither torch nor deepspeed."""

from ds_llmpq.planner.incumbent import ProgressEvent
from ds_llmpq.planner.objective import Assignment, Prediction, Stage, evaluate, violations
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.plan import Plan, PlanStage, SolverReport
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.solve import check_plan, pareto, solve

__all__ = [
    "Assignment",
    "Pins",
    "Plan",
    "PlanStage",
    "Prediction",
    "Problem",
    "ProgressEvent",
    "SolverReport",
    "Stage",
    "check_plan",
    "evaluate",
    "pareto",
    "solve",
    "violations",
]
