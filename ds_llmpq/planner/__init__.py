"""The planner room: a problem goes in, a plan with a proven bound comes out. Imports neither torch nor deepspeed."""

from ds_llmpq.planner.objective import Assignment, Prediction, Stage, evaluate, violations
from ds_llmpq.planner.plan import Plan, PlanStage, SolverReport
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.solve import solve

__all__ = [
    "Assignment",
    "Plan",
    "PlanStage",
    "Prediction",
    "Problem",
    "SolverReport",
    "Stage",
    "evaluate",
    "solve",
    "violations",
]
