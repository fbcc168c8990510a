"""Plans as typed data, on disk and in memory: all that the engine reads. No solver, and no torch."""

from ds_llmpq.plan.assignment import Assignment, StageAssignment
from ds_llmpq.plan.check_model import check_model
from ds_llmpq.plan.placement import launch_order, placements
from ds_llmpq.plan.plan import BASELINES, ESTIMATES, Plan, check_shared_cache
from ds_llmpq.plan.plan_parts import (
    MEMORY_PARTS,
    Deployment,
    LinkSeconds,
    MicroBatches,
    PassTimes,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
)
from ds_llmpq.plan.planfile import read_assignment, read_plan, write_plan

__all__ = [
    "BASELINES",
    "ESTIMATES",
    "MEMORY_PARTS",
    "Assignment",
    "Deployment",
    "LinkSeconds",
    "MicroBatches",
    "PassTimes",
    "Plan",
    "PlannedModel",
    "PredictedTotals",
    "Quantization",
    "SolverReport",
    "Stage",
    "StageAssignment",
    "StageMemory",
    "Workload",
    "check_model",
    "check_shared_cache",
    "launch_order",
    "placements",
    "read_assignment",
    "read_plan",
    "write_plan",
]
