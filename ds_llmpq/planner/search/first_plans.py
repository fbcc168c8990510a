"""Good plans in the first second: the relaxation's paths at the thresholds that the fractional optimum aims at.

The fractional optimum of a micro-batch pair says how slow the slowest resources of a good plan are. Whole layers need a
little more, so a few boxes that end just above are tried, each a shortest path rounded to a plan.
"""

import time
from collections.abc import Sequence

from ds_llmpq.planner.search.fractional import Fractional
from ds_llmpq.planner.search.node import Duals, Node, Target
from ds_llmpq.planner.search.relaxation import Relaxation
from ds_llmpq.planner.search.stage_bounds import Box

PAIRS = 3  # the most promising ones
# of the fractional optimum's slowest resources; nearest to it there often is a better plan, but more often none
FACTORS = (1.15, 1.05, 1.4, 2.0)
PRICE_FACTORS = (1.0, 1.5, 4.0)  # of its price of quality, where rounding may break a limit
PRICE_ROUNDS = 6  # of device classes, where they are priced


def offer_first_plans(
    relaxed: Relaxation,
    roots: Sequence[tuple[Node, Fractional]],
    target: Target,
    factors: Sequence[float],
    *,
    bound: float,
    deadline: float,
) -> None:
    """Offer what is found to the target's incumbent, until the deadline or until `bound`, proven already, is reached.

    `roots`: the whole boxes of the most promising micro-batch pairs; `factors`: those of `FACTORS` to try.
    """
    thetas = (1.0,) if relaxed.mode == "theta" else PRICE_FACTORS
    for factor in factors:
        for root, known in roots:
            for theta in thetas:
                if time.monotonic() > deadline or target.met_by(bound):
                    return
                node = _aim(root, known, factor, theta if relaxed.mode != "max_latency" else 1 / theta)
                if node is not None:
                    _offer(relaxed, node, target)


def _aim(root: Node, known: Fractional, factor: float, theta: float) -> Node | None:
    """The root's box cut at `factor` times the fractional optimum's slowest resources; None where these are unknown."""
    if known.slowest_prefill is None or known.slowest_decode is None:
        return None
    box = Box(
        root.box.p_low,
        max(root.box.p_low, factor * known.slowest_prefill),
        root.box.d_low,
        max(root.box.d_low, factor * known.slowest_decode),
    )
    return Node(root.pair, box, Duals(theta * root.duals.theta, root.duals.w, root.duals.prices))


def _offer(relaxed: Relaxation, node: Node, target: Target) -> None:
    if relaxed.priced:
        node = relaxed.with_better_prices(node, PRICE_ROUNDS, target.value)
    _, path = relaxed.evaluate(node)
    assignment = relaxed.round_path(node, path) if path else None
    if assignment is not None:
        target.best.offer(assignment)
