"""Good plans in the first second: the relaxation's paths at the thresholds that the fractional optimum aims at.

The fractional optimum of a micro-batch pair says how slow the slowest resources of a good plan are. Whole layers need a
little more, so a few boxes that end just above are tried, each a shortest path rounded to a plan.
"""

import time

from ds_llmpq.planner.search.branch_and_bound import Search
from ds_llmpq.planner.search.relaxation import Duals, Node
from ds_llmpq.planner.search.stage_bounds import Box

PAIRS = 3  # the most promising ones
FACTORS = (1.05, 1.15, 1.4, 2.0)  # of the fractional optimum's slowest resources
PRICE_FACTORS = (1.0, 1.5, 4.0)  # of its price of quality, where rounding may break a limit
PRICE_ROUNDS = 6  # of device classes, where they are priced


def offer_first_plans(search: Search) -> None:
    """Offer what is found to the incumbent, until the deadline."""
    thetas = (1.0,) if search.mode == "theta" else PRICE_FACTORS
    roots = [entry[2] for entry in sorted(search.open)[:PAIRS]]
    for factor in FACTORS:
        for root in roots:
            for theta in thetas:
                if time.monotonic() > search.deadline or search.done():
                    return
                _offer(search, root, factor, theta if search.mode != "max_latency" else 1 / theta)


def _offer(search: Search, root: Node, factor: float, theta: float) -> None:
    relaxed, known = search.relaxed, search.known(root.pair)
    if known.slowest_prefill is None or known.slowest_decode is None:
        return
    box = Box(
        root.box.p_low,
        max(root.box.p_low, factor * known.slowest_prefill),
        root.box.d_low,
        max(root.box.d_low, factor * known.slowest_decode),
    )
    node = Node(root.pair, box, Duals(theta * root.duals.theta, root.duals.w, root.duals.prices))
    if search.priced:
        node = relaxed.with_better_prices(node, PRICE_ROUNDS, search.target)
    ((_, path),) = relaxed.evaluate([node])
    assignment = relaxed.rounded(node, path) if path else None
    if assignment is not None:
        search.best.offer(assignment)
