"""From a problem to a plan with a proven bound."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.planner.exact import solve_exact
from ds_llmpq.planner.feasibility import explain_memory, memory_feasible
from ds_llmpq.planner.incumbent import Incumbent, ProgressEvent
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.plan import Plan, SolverReport
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.search import Search

SOLVERS = ("auto", "gurobi", "highs", "search")


def solve(
    problem: Problem | Mapping[str, Any],
    *,
    time_limit_seconds: float = 60.0,
    gap: float = 0.01,
    solver: str = "auto",
    seed: int = 0,
    progress: Callable[[ProgressEvent], None] | None = None,
    pins: Any = None,
    baselines: bool = True,
    formula: str = "pipeline",
) -> Plan:
    """The best plan found and how far from the optimum it can be at most.

    `problem` is a `Problem` or the parsed `problem.json`. Raises `UserError` for a malformed problem and
    `InfeasibleError` with an explanation when no plan exists.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver is {solver!r}, but must be one of {', '.join(SOLVERS)}.")
    started = time.monotonic()
    problem = problem if isinstance(problem, Problem) else Problem.from_json(problem)
    if not memory_feasible(problem):
        raise explain_memory(problem)
    best = Incumbent(problem, formula, started=started, progress=progress)
    deadline = started + time_limit_seconds
    if solver == "search":
        search = Search(problem, best, Pins(), gap=gap, deadline=deadline)
        search.run()
        used = "search"
    else:
        used = solve_exact(problem, best, solver, deadline=deadline, gap=gap, seed=seed)
    if best.assignment is None:
        raise InfeasibleError("No plan meets the limit; raise problem.objective.limit.")
    seconds = time.monotonic() - started
    status = "optimal" if best.gap <= gap else "time_limit"
    gap_reached = best.gap if math.isfinite(best.gap) else None
    report = SolverReport(used, best.value, best.bound, gap_reached, seconds, status)
    return Plan.build(problem, best.assignment, best.prediction, report)
