"""From a problem to a plan with a proven bound: baselines, search, polish, and the whole-problem model at need."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import BASELINES, ESTIMATES, Assignment, Plan, SolverReport
from ds_llmpq.planner.baselines import QUICK_BASELINES, Baseline, find_baseline
from ds_llmpq.planner.deploy import compose_plan
from ds_llmpq.planner.explain import explain_plan
from ds_llmpq.planner.feasibility import explain_memory, memory_feasible, pairs
from ds_llmpq.planner.incumbent import Incumbent, ProgressEvent, relative_gap
from ds_llmpq.planner.limits import explain_limit, find_least, is_broken
from ds_llmpq.planner.milp.exact import solve_exact
from ds_llmpq.planner.milp.polish import polish
from ds_llmpq.planner.objective import evaluate, find_time_error, objective_value
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.search.branch_and_bound import Search, is_small
from ds_llmpq.planner.search.constrained import find_price_of_limit
from ds_llmpq.planner.search.first_plans import FACTORS, PAIRS, offer_first_plans
from ds_llmpq.planner.search.fractional import Fractionals, first_bounds, simple_bound
from ds_llmpq.planner.single_stage import offer_single_stages
from ds_llmpq.planner.unquantized import leave_unquantized, raise_bits
from ds_llmpq.quant.packing import UNQUANTIZED_BITS
from ds_llmpq.wording import format_number

SOLVERS = ("auto", "gurobi", "highs", "search")
EXACT_COLUMNS = 1200  # layers x devices x widths up to which the whole-problem model is tried when the search stalls
LEAST_SECONDS, LEAST_GAP = 2.0, 1e-3  # for the least of what a limit bounds: at any rate, and how well it is known
PROVENANCE = {"costs": "assumed: taken from problem.json as given"}


@dataclass
class _Run:
    """One call of `solve`: what its steps share."""

    problem: Problem
    pins: Pins
    best: Incumbent
    solver: str
    gap: float
    deadline: float
    seed: int
    names: list[str] = field(default_factory=list)
    first: Fractionals = field(default_factory=dict)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    least: Incumbent | None = None  # of what is limited, where no plan was known to keep the limit
    search: Search | None = None  # None: solved by the whole-problem models alone

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note_solver(self, name: str) -> None:
        if name not in self.names:
            self.names.append(name)


def solve(
    problem: Problem | Mapping[str, Any],
    *,
    time_limit_seconds: float = 60.0,
    gap: float = 0.01,
    solver: str = "auto",
    seed: int = 0,
    progress: Callable[[ProgressEvent], None] | None = None,
    pins: Pins | Mapping[str, Any] | None = None,
    baselines: bool = True,
    baseline: str | None = None,
    least_gain: float = 0.0,
) -> Plan:
    """The best plan found, with a proven bound on how far from the optimum it can be.

    `problem` is a `Problem` or the parsed `problem.json`. The search stops at relative gap `gap`, at the time limit, or
    at Ctrl-C; the last two keep the incumbent and its bound. `solver`: "auto" (search, then polish by a mixed-integer
    solver), "search" alone, or "gurobi" / "highs" (the whole-problem models alone: small problems).
    `baseline`: that method's plan instead (`planner.baselines`), with no bound; limits of loss and latency are not its.
    `least_gain`: an unquantized plan is taken where the best one is not faster by this share, or by less than its times
    are off (`find_time_error`); 0: never.
    Raises `UserError` for a malformed problem and `InfeasibleError` with an explanation when no plan exists.
    """
    started = time.monotonic()
    _check_options(time_limit_seconds, gap, solver, least_gain)
    problem = problem if isinstance(problem, Problem) else Problem.from_json(problem)
    if baseline is not None:
        return _plan_baseline(problem, baseline, pins)
    pins = Pins.from_json(pins, problem)
    problem = pins.apply(problem)
    if not memory_feasible(problem):
        raise explain_memory(problem)
    best = Incumbent(problem, accepts=pins.respects, started=started, progress=progress)
    run = _Run(problem, pins, best, solver, gap, started + time_limit_seconds, seed)
    status = "optimal"
    whole: Assignment | None = None
    try:
        _begin(run)
        if least_gain > 0 and problem.objective.mode != "max_latency":
            whole = _solve_unquantized(run)
        _optimise(run)
    except KeyboardInterrupt:
        if best.assignment is None:
            raise
        status = "interrupted"
    if best.assignment is None:
        raise _no_plan(run)
    if status == "optimal" and not best.is_within(gap):
        status = "time_limit" if run.left <= 0 else "stalled"
    assignment, rival = _prefer_unquantized(run, whole, least_gain) if least_gain > 0 else (best.assignment, None)
    prediction = evaluate(problem, assignment)
    value, seconds = objective_value(problem, prediction), time.monotonic() - started
    proven = _finite(relative_gap(value, best.bound))
    report = SolverReport("+".join(run.names) or solver, value, best.bound, proven, seconds, status)
    plan = compose_plan(problem, assignment, prediction, report)
    found = {name: run.baselines[name].outcome for name in BASELINES if name in run.baselines}
    reported = found if baselines else {}
    plan = replace(plan, baselines=reported, provenance=PROVENANCE)
    return replace(plan, explanation=tuple(explain_plan(problem, plan, rival)))


def _plan_baseline(problem: Problem, name: str, pins: Any) -> Plan:
    started = time.monotonic()
    if pins:
        raise UserError(f"planner.baseline={name} knows no pins; leave planner.pins out.")
    found = find_baseline(problem, name)
    if isinstance(found.outcome, str):
        raise InfeasibleError(f"planner.baseline={name} has no plan ({found.outcome}).")
    if found.assignment is None:
        speed = format_number(found.outcome.throughput_tokens_per_second, 4)
        raise UserError(
            f"planner.baseline={name} is an estimate of weight offloading ({speed} tokens/s at {ESTIMATES[name]} "
            "bits), which this engine cannot run; take another baseline."
        )
    prediction = evaluate(problem, found.assignment)
    value = objective_value(problem, prediction)
    report = SolverReport(name, value, None, None, time.monotonic() - started, "baseline")
    plan = replace(compose_plan(problem, found.assignment, prediction, report), provenance=PROVENANCE)
    return replace(plan, explanation=tuple(explain_plan(problem, plan)))


def _check_options(time_limit_seconds: float, gap: float, solver: str, least_gain: float) -> None:
    if not 0 <= least_gain < math.inf:
        raise UserError(f"least_gain is {least_gain}, but must be at least 0; 0.01 means one per cent.")
    if solver not in SOLVERS:
        raise UserError(f"solver is {solver!r}, but must be one of {', '.join(SOLVERS)}.")
    if not time_limit_seconds > 0:
        raise UserError(f"time_limit_seconds is {time_limit_seconds}, but must be above 0.")
    if not 0 <= gap < 1:
        raise UserError(f"gap is {gap}, but must be at least 0 and below 1; 0.01 means one per cent.")


def _begin(run: _Run) -> None:
    """What is had at once: a first bound by arithmetic, plans by the quick baselines; in the time there is, a better
    bound and plans rounded from it. The slower baselines come after the first of these, whatever the time limit."""
    problem, pins, best = run.problem, run.pins, run.best
    offer_single_stages(best, pins, lambda alone, own: _solve_alone(run, alone, own))
    best.raise_bound(min(simple_bound(problem, pins, pair) for pair in pairs(problem)))
    for name in QUICK_BASELINES:
        _offer_baseline(run, name)
    run.first = first_bounds(problem, pins, run.deadline)
    best.raise_bound(min((known.bound for known in run.first.values()), default=math.inf))
    if run.solver in ("auto", "search"):
        run.note_solver("search")
        run.search = Search(problem, best, pins, **_search_options(run))
        _offer_first_plans(run, FACTORS[:1])
    for name in BASELINES:
        if name not in run.baselines:
            _offer_baseline(run, name)
    if run.search is not None:
        _offer_first_plans(run, FACTORS[1:])
    if best.assignment is None and problem.objective.mode != "theta":
        _try_limit(run)


def _offer_first_plans(run: _Run, factors: Sequence[float]) -> None:
    search = run.search
    limits = {"bound": search.bound, "deadline": run.deadline}
    offer_first_plans(search.relaxed, search.roots(PAIRS), search.goal, factors, **limits)


def _solve_alone(run: _Run, problem: Problem, pins: Pins) -> tuple[Assignment | None, float]:
    """The best plan on one device, in at most a tenth of the time, and what is proven of all."""
    options = {"gap": run.gap, "solver": run.solver, "seed": run.seed, "pins": pins, "baselines": False}
    try:
        plan = solve(problem, time_limit_seconds=max(run.left / 10, LEAST_SECONDS), **options)
    except InfeasibleError:
        return None, math.inf
    except UserError:  # there was no time to tell
        return None, min(simple_bound(problem, pins, pair) for pair in pairs(problem))
    if plan.solver.status == "interrupted":
        raise KeyboardInterrupt
    return plan.assignment(), plan.solver.bound


def _try_limit(run: _Run) -> None:
    """Where nothing keeps the limit so far: the least of what is limited, which may be a plan, or prove there is none.
    It comes whatever the time limit, because without a plan it is the answer."""
    deadline = max(run.deadline - run.left / 2, time.monotonic() + LEAST_SECONDS)
    limits = {"gaps": (run.gap, min(run.gap, LEAST_GAP)), "deadline": deadline}

    def improve(least: Incumbent) -> None:
        if least.assignment is not None:
            polish(least.problem, least, run.pins, least.assignment, seconds=1.0, seed=run.seed, gap=1e-4)

    run.least = find_least(run.problem, run.pins, **limits, improve=improve if run.solver == "auto" else None)
    if is_broken(run.problem, run.least):
        run.best.raise_bound(math.inf)
        raise explain_limit(run.problem, run.least, proven=True)
    if run.least.assignment is not None:
        run.best.offer(run.least.assignment)


def _offer_baseline(run: _Run, name: str) -> None:
    found = run.baselines[name] = find_baseline(run.problem, name)
    if found.assignment is not None:
        run.best.offer(found.assignment)


def _search_options(run: _Run) -> dict[str, Any]:
    improve = (lambda start=None: _polish(run, 2.0, start)) if run.solver == "auto" else None
    return {"gap": run.gap, "deadline": run.deadline, "improve": improve, "first": run.first}


def _optimise(run: _Run) -> None:
    """Raise the bound and improve the incumbent of `run.best` by the solver asked for."""
    if run.search is None:
        run.note_solver(solve_exact(run.problem, run.best, run.solver, run.pins, run.deadline, run.gap, run.seed))
        return
    search, options = run.search, _search_options(run)
    guess = None if is_small(run.problem) else search.guess_theta()
    theta = None
    if guess is not None:
        limits = {name: options[name] for name in ("gap", "deadline", "improve")}
        theta = find_price_of_limit(run.problem, run.best, run.pins, guess, **limits)
    if run.best.is_within(run.gap) and run.best.assignment is not None:
        return
    if theta is not None:
        search = Search(run.problem, run.best, run.pins, **options, theta=theta)
    try:
        search.run()
    finally:
        run.best.raise_bound(search.bound)
    if run.solver != "auto":
        return
    size = run.problem.layers * len(run.problem.devices) * len(run.problem.bits)
    if not run.best.is_within(run.gap) and run.left > 0 and size <= EXACT_COLUMNS and not math.isinf(search.bound):
        run.note_solver(solve_exact(run.problem, run.best, "auto", run.pins, run.deadline, run.gap, run.seed))
    elif run.best.assignment is not None:
        _polish(run, 2.0)


def _solve_unquantized(run: _Run) -> Assignment | None:
    """The best plan without quantized layers, in a fifth of the time, and offered as a first plan."""
    problem = leave_unquantized(run.problem)
    if problem is None or run.left <= 0:
        return None
    options = {"gap": run.gap, "solver": run.solver, "seed": run.seed, "pins": run.pins, "baselines": False}
    try:
        plan = solve(problem, time_limit_seconds=run.left / 5, **options)
    except UserError:
        return None  # the pins or the limit of the objective do not permit it
    run.best.offer(plan.assignment())
    if plan.solver.status == "interrupted":
        raise KeyboardInterrupt
    return plan.assignment()


def _prefer_unquantized(run: _Run, whole: Assignment | None, least_gain: float) -> tuple[Assignment, Assignment | None]:
    """The plan with more bits where that slows it down by no more than `least_gain`, and the one to compare it with.

    `whole` first of all, also where the best plan is faster by less than its times are off; that one is named then. If
    it is faster by more, `whole` is.
    """
    problem, best = run.problem, run.best
    seconds = best.prediction.latency_seconds
    quantized = any(bits < UNQUANTIZED_BITS for stage in best.assignment.stages for bits in stage.bits)
    if problem.objective.mode == "max_latency" or not quantized:
        return best.assignment, None
    if whole is not None:
        slower = evaluate(problem, whole).latency_seconds / seconds if seconds > 0 else 1.0
        if slower <= 1 + least_gain:
            return whole, None
        if slower <= 1 + (find_time_error(problem, best.assignment) or 0.0):
            return whole, best.assignment
    return raise_bits(problem, best.assignment, run.pins.respects, (1 + least_gain) * seconds), whole


def _polish(run: _Run, seconds: float, start: Assignment | None = None) -> None:
    """Repeat the polish while it helps, from the incumbent or another plan."""
    for _ in range(3):
        before, start = run.best.value, start or run.best.assignment
        if start is None or run.left <= 0:
            return
        limits = {"seconds": min(seconds, run.left), "seed": run.seed, "gap": min(1e-3, run.gap / 4)}
        name = polish(run.problem, run.best, run.pins, start, **limits)
        if run.best.value >= before:
            return
        run.note_solver(name)
        start = None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _no_plan(run: _Run) -> UserError:
    """Why nothing was found: the limit cannot be met (proven), or the time was too short."""
    if run.least is not None:
        return explain_limit(run.problem, run.least, proven=math.isinf(run.best.bound))
    if run.left <= 0 and not math.isinf(run.best.bound):
        return UserError(
            f"No plan was found within {run.deadline - run.best.started:g} seconds; raise planner.time_limit_seconds."
        )
    return InfeasibleError("No plan keeps all pins and the memory of every device; loosen the pins or add memory.")
