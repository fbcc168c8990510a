"""Plans of one stage, where a device that has its host to itself is faster than beside others.

The search has one time of a layer on a device, whatever stands on the others. So these plans, one problem of one device
each, are found before it, and the search sees them at the longer times. What is proven of them limits what may be said
to be proven of all.
"""

from __future__ import annotations

from collections.abc import Callable

from ds_llmpq.plan import Assignment
from ds_llmpq.planner.incumbent import Incumbent
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem

# (problem, pins) -> (its best plan if there is one, what is proven of all)
SolveOne = Callable[[Problem, Pins], tuple[Assignment | None, float]]


def offer_single_stages(best: Incumbent, pins: Pins, solve_one: SolveOne) -> None:
    """Offers the best plan of each device alone, and lets no bound of `best` pass what is proven of these."""
    problem = best.problem
    if len(problem.devices) == 1:  # the search sees what there is
        return
    seen = set()
    for device in problem.devices:
        if not problem.device_types[device.type].faster_alone:
            continue
        if pins.layers and dict(pins.layers) != {device.name: (0, problem.layers)}:
            continue
        if (device.type, device.memory_bytes) in seen:
            continue
        seen.add((device.type, device.memory_bytes))
        assignment, bound = solve_one(problem.with_devices([device.name]), Pins(bits=pins.bits))
        if assignment is not None:
            best.offer(assignment)
        best.most_bound = min(best.most_bound, bound)
