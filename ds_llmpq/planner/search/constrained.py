"""Hard limits by price: find the theta at which the limit on quality loss (or on latency) is just met.

For every theta the least latency + theta * loss, found by the unbounded search, bounds the problem with a limit:

    latency >= bound(theta) - theta * limit                if loss <= limit,
    loss    >= (bound(theta) - limit) / theta              if latency <= limit.

The best theta is found by bisection, its plans are repaired by the polish (which knows the hard limit), and the search
proper starts from it. Small problems need none of this.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

from ds_llmpq.plan import Assignment
from ds_llmpq.planner.incumbent import Incumbent
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Objective, Problem
from ds_llmpq.planner.search.branch_and_bound import Search
from ds_llmpq.planner.search.node import Guess

ROUNDS = 9
STEP, NEAR_STEP = 4.0, 1.6  # while only one side of the bracket is known: from a guess, from the first bound's price
NARROW = 1.25  # ratio of the bracket's ends at which it is not worth going on
COARSE_GAP = 0.03  # a rough plan is enough to see on which side of the limit a theta lies


def find_price_of_limit(
    problem: Problem,
    best: Incumbent,
    pins: Pins,
    guess: Guess,
    *,
    gap: float,
    deadline: float,
    improve: Callable[[Assignment | None], None] | None,
) -> float:
    """The best theta found for the problem's limit; offers plans to `best` and raises its bound on the way."""
    objective = problem.objective
    theta, step = guess.theta, NEAR_STEP if guess.near else STEP
    low, high = 0.0, math.inf
    reached, best_theta = -math.inf, theta
    share = 0.1 * (deadline - time.monotonic())
    for _ in range(ROUNDS):
        left = deadline - time.monotonic()
        if left < 3 * share or high / max(low, 1e-300) < NARROW:
            break
        priced = replace(problem, objective=Objective("theta", theta=theta))
        found = Incumbent(priced, accepts=pins.respects)
        if best.assignment is not None:
            found.offer(best.assignment)
        Search(priced, found, pins, gap=max(gap, COARSE_GAP), deadline=time.monotonic() + share).run()
        bound = _bound(objective, found.bound, theta)
        if bound > reached:
            reached, best_theta = bound, theta
        best.raise_bound(bound)
        if found.assignment is None:
            break
        _repair(best, found.assignment, improve)
        if best.assignment is not None and best.is_within(gap):
            break
        if _affordable(objective, found):
            low = theta
        else:
            high = theta
        if high == objective.theta:
            break  # the limit costs nothing
        if low > 0 and math.isfinite(high):
            theta = math.sqrt(low * high)
        else:
            theta = max(theta * step if low == theta else theta / step, objective.theta)
    return best_theta


def _repair(best: Incumbent, assignment: Assignment, improve: Callable[[Assignment | None], None] | None) -> None:
    """Offer a priced plan; whether it keeps the limit or not, its neighbourhood may hold a better one that does."""
    best.offer(assignment)
    if improve is not None:
        improve(assignment)


def _bound(objective: Objective, priced: float, theta: float) -> float:
    if objective.mode == "max_quality_loss":
        return priced - (theta - objective.theta) * objective.limit
    return (priced - objective.limit) / theta


def _affordable(objective: Objective, found: Incumbent) -> bool:
    """Quality may be priced higher: its limit is exceeded, or the latency's is not reached."""
    if objective.mode == "max_quality_loss":
        return found.prediction.quality_loss > objective.limit
    return found.prediction.latency_seconds <= objective.limit
