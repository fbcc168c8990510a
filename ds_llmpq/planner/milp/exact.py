"""The whole problem as mixed-integer models: one a micro-batch pair, all device orders and subsets inside it.

Exact, and independent of the specialised search; meant for small and medium problems and for checking.
"""

import math
import time

from ds_llmpq.planner.arrays import pair_arrays
from ds_llmpq.planner.feasibility import furthest_layer, pairs
from ds_llmpq.planner.incumbent import Incumbent, sufficient_bound
from ds_llmpq.planner.milp.formulation import formulate, typical_scale
from ds_llmpq.planner.milp.model import solve_model
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem


def solve_exact(
    problem: Problem, best: Incumbent, solver: str, pins: Pins, deadline: float, gap: float, seed: int
) -> str:
    """Improve `best` and raise its bound; returns the name of the solver used."""
    used = solver
    candidates = [pair for pair in pairs(problem) if furthest_layer(problem, *pair) == problem.layers]
    bounds = dict.fromkeys(candidates, 0.0)
    scale, allowed = 1000.0, pins.placements(problem)
    for pair in candidates:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            break
        if math.isfinite(best.value):
            scale = typical_scale(problem, best.value)
        arrays = pair_arrays(problem, *pair)
        form = formulate(problem, arrays, allowed=allowed, scale=scale)
        # Plans that improve by less than the gap are not worth proving; with no gap, ties may still be decided.
        cutoff = math.inf
        if math.isfinite(best.value):
            cutoff = sufficient_bound(best.value * scale, gap) * (1 + 1e-9) + 1e-9
        # The solvers' gap is relative to the objective, ours to the bound.
        solution = solve_model(form.model, solver, seconds=seconds, gap=gap / (1 + gap), cutoff=cutoff, seed=seed)
        used = solution.solver
        bounds[pair] = max(0.0, solution.bound / scale)
        if solution.x is not None:
            best.offer(form.decode(problem, solution.x))
    best.raise_bound(min(bounds.values(), default=math.inf))
    return used
