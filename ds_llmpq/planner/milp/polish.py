"""Improve a plan exactly within its neighbourhood: its devices and order stay, boundaries move by a few layers.

The model has a few hundred to two thousand columns; all widths are free. What it finds is judged like any other plan.
"""

import numpy as np

from ds_llmpq.plan import Assignment
from ds_llmpq.planner.arrays import pair_arrays
from ds_llmpq.planner.incumbent import Incumbent
from ds_llmpq.planner.milp.formulation import formulate, typical_scale
from ds_llmpq.planner.milp.model import solve_model
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem

COLUMN_LIMIT = 1900  # keeps the model within the restricted Gurobi licence, and quick


def polish(
    problem: Problem,
    best: Incumbent,
    pins: Pins,
    assignment: Assignment,
    *,
    seconds: float,
    seed: int,
    gap: float,
) -> str:
    """Solve the neighbourhood of `assignment`, offer what is found; returns the name of the solver used."""
    index = {device.name: d for d, device in enumerate(problem.devices)}
    chain = [index[stage.device] for stage in assignment.stages]
    arrays = pair_arrays(problem, assignment.prefill_micro_batch, assignment.decode_micro_batch)
    scale = typical_scale(problem, best.value)
    cutoff = best.value * scale if np.isfinite(best.value) else np.inf
    allowed = pins.placements(problem)
    for reach in (3, 2, 1):
        near = _near(problem, assignment, chain, reach)
        if (allowed & near[:, :, None]).sum() <= COLUMN_LIMIT:
            break
    form = formulate(problem, arrays, chain=chain, allowed=allowed & near[:, :, None], scale=scale)
    solution = solve_model(form.model, seconds=seconds, gap=gap, cutoff=cutoff, seed=seed)
    if solution.x is not None:
        best.offer(form.decode(problem, solution.x))
    return solution.solver


def _near(problem: Problem, assignment: Assignment, chain: list[int], reach: int) -> np.ndarray:
    """[L, D] bool: layers at most `reach` away from the stage the device holds now."""
    near = np.zeros((problem.layers, len(problem.devices)), dtype=bool)
    for device, stage in zip(chain, assignment.stages, strict=True):
        near[max(0, stage.first - reach) : stage.last + reach, device] = True
    return near
