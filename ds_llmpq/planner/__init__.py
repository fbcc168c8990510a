"""The planner room: a problem goes in, a plan with a proven bound comes out. Imports neither torch nor deepspeed."""

from ds_llmpq.planner.check import check_plan
from ds_llmpq.planner.incumbent import ProgressEvent
from ds_llmpq.planner.objective import Prediction, evaluate, violations
from ds_llmpq.planner.pareto import pareto
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.solve import solve

__all__ = [
    "Pins",
    "Prediction",
    "Problem",
    "ProgressEvent",
    "check_plan",
    "evaluate",
    "pareto",
    "solve",
    "violations",
]
