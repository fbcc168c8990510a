"""Hard limits that no plan keeps: the least loss, or the least latency, that the devices allow, found for itself.

A search under a limit that cannot be kept would raise the price of what is limited without end. The limited quantity
alone, minimised without the limit, decides in a second or two: its bound proves that there is no plan, and a plan of
it that keeps the limit is a first plan. The least loss is a matter of memory alone, so it is sought in a problem that
takes no time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import Assignment
from ds_llmpq.planner.incumbent import Incumbent
from ds_llmpq.planner.objective import RELATIVE_TOLERANCE
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import DeviceSpeeds, LinkCost, MicroBatchCandidates, Objective, Problem
from ds_llmpq.planner.search.branch_and_bound import Search
from ds_llmpq.planner.single_stage import offer_single_stages
from ds_llmpq.wording import format_number

Improve = Callable[[Incumbent], None]


def find_least(
    problem: Problem, pins: Pins, *, gaps: Sequence[float], deadline: float, improve: Improve | None
) -> Incumbent:
    """The least of what the problem's mode limits: nats per token or seconds, with its plan and its bound.

    It is known within the first of `gaps`, or the next ones if that does not decide whether a plan keeps the limit.
    `improve` polishes the plan of such a search.
    """
    if problem.objective.mode == "max_quality_loss":
        alone = replace(leave_out_seconds(problem), objective=Objective("theta", theta=1.0))
    else:
        alone = replace(problem, objective=Objective("theta", theta=0.0))
    found = Incumbent(alone, accepts=pins.respects)
    offer_single_stages(found, pins, lambda one, own: _find_least_alone(one, own, min(gaps), deadline))
    polish = None if improve is None else lambda: improve(found)
    for gap in gaps:
        search = Search(alone, found, pins, gap=gap, deadline=deadline, improve=polish)
        search.run()
        found.raise_bound(search.bound)
        if polish is not None and not found.is_within(gap):
            polish()
        if is_broken(problem, found) or found.value <= problem.objective.limit:
            break
    return found


def _find_least_alone(problem: Problem, pins: Pins, gap: float, deadline: float) -> tuple[Assignment | None, float]:
    """The least of one device alone, and its bound."""
    found = Incumbent(problem, accepts=pins.respects)
    search = Search(problem, found, pins, gap=gap, deadline=deadline)
    search.run()
    found.raise_bound(search.bound)
    return found.assignment, found.bound


def is_broken(problem: Problem, least: Incumbent) -> bool:
    """Whether no plan keeps the limit: even the bound on what is limited exceeds it."""
    return least.bound > problem.objective.limit * (1 + RELATIVE_TOLERANCE)


def leave_out_seconds(problem: Problem) -> Problem:
    """The problem with every time at zero; of the micro-batch sizes those that leave most memory, where they all run
    the same bit widths."""
    kept = problem.micro_batches
    if all(map(_runs_all_sizes(problem), problem.device_types.values())):
        workspace = problem.memory.workspace_bytes
        kept = MicroBatchCandidates(
            *((min(sizes, key=lambda size, used=used: used[size]),) for sizes, used in (
                (kept.prefill, workspace.prefill), (kept.decode, workspace.decode)))
        )  # fmt: skip
    none = LinkCost(0.0, 0.0)
    return replace(
        problem,
        micro_batches=kept,
        device_types={name: _stop_clock(entry) for name, entry in problem.device_types.items()},
        links=replace(problem.links, default=none, pairs={}),
    )


def _runs_all_sizes(problem: Problem) -> Callable[[DeviceSpeeds], bool]:
    sizes = {phase: len(getattr(problem.micro_batches, phase)) for phase in ("prefill", "decode")}

    def runs_all(entry: DeviceSpeeds) -> bool:
        """Every table has all sizes or none."""
        return all(
            len(table) in (0, sizes[phase])
            for phase in sizes
            for table in (
                *getattr(entry, f"{phase}_layer_seconds").values(),
                getattr(entry, f"{phase}_embed_seconds"),
                getattr(entry, f"{phase}_head_seconds"),
            )
        )

    return runs_all


def _stop_clock(entry: DeviceSpeeds) -> DeviceSpeeds:
    tables = {
        f"{phase}_layer_seconds": {
            bits: dict.fromkeys(seconds, 0.0) for bits, seconds in getattr(entry, f"{phase}_layer_seconds").items()
        }
        for phase in ("prefill", "decode")
    }
    for part in ("prefill_embed", "prefill_head", "decode_embed", "decode_head"):
        tables[f"{part}_seconds"] = dict.fromkeys(getattr(entry, f"{part}_seconds"), 0.0)
    return replace(entry, **tables, contention_seconds=0.0)


def explain_limit(problem: Problem, least: Incumbent, *, proven: bool) -> UserError:
    """The error for a limit that no plan keeps, be that `proven` or not known yet."""
    objective = problem.objective
    if objective.mode == "max_latency":
        unit, name, helps = "s", "planner.max_latency_seconds", "devices"
        lead = f"No plan is as fast as {objective.limit:.6g} s"
    else:
        unit, name, helps = "nats per token", "planner.max_quality_loss", "memory"
        lead = f"No plan that fits the devices' memory loses as little quality as {objective.limit:.6g} nats per token"
    name += " (problem.objective.limit)"
    if least.assignment is None:
        if math.isinf(least.bound):
            return InfeasibleError("No plan keeps all pins and the memory of every device; loosen the pins.")
        best, remedy = "", f"set {name} above {format_number(least.bound, 6)}"
    else:
        reached = f"{round_up(least.value):.12g}"
        best = f"the best found has {reached} {unit}, and "
        remedy = f"set {name} to {reached} or more, or add {helps}"
    if proven:
        return InfeasibleError(f"{lead}: {best}none has less than {format_number(least.bound, 6)}; {remedy}.")
    return UserError(
        f"No plan with at most {objective.limit:.6g} {unit} was found in time: {best}it is not known whether there is "
        f"a better one; {remedy}, or raise planner.time_limit_seconds."
    )


def round_up(value: float, digits: int = 6) -> float:
    """Not less than `value`, with so many significant digits: a limit to set must be kept by the plan found."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return math.ceil(value / step) * step
