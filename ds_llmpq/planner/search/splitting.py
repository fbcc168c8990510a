"""Where a box of thresholds is cut in two, and how much of it need not be looked at."""

import math
from dataclasses import replace

from ds_llmpq.planner.search.node import Node, Pair, round_weights
from ds_llmpq.planner.search.stage_bounds import Box

SLOWEST_WEIGHT, RING_WEIGHT = 0.3, 0.02  # least share of a decode round by which the splitting counts its threshold


def find_tops(node: Node, box: Box) -> tuple[float, float]:
    """The slowest resources of the node's plan, at most the box's: above them the box need not be split."""
    seen = node.prediction
    if seen is None:
        return box.p_high, box.d_high
    return min(box.p_high, seen.slowest_prefill_seconds), min(box.d_high, seen.slowest_decode_seconds)


def weigh_gaps(pair: Pair, node: Node, box: Box, p_top: float, d_top: float) -> tuple[float, float]:
    """What the thresholds' uncertainty contributes to the difference between plan and bound."""
    seen = node.prediction
    p_gap = pair.slow * max(p_top - box.p_low, 0.0)
    # Where a pass around the ring binds, the slowest decode resource matters through its limit alone.
    least = RING_WEIGHT if seen is not None and seen.ring_binds(pair.arrays.decode_rounds) else SLOWEST_WEIGHT
    if pair.arrays.decode_rounds == 1:
        least = 0.0  # it always binds
    return p_gap, pair.slowest * max(node.duals.w, least) * max(d_top - box.d_low, 0.0)


def halve(pair: Pair, node: Node, box: Box, p_top: float, d_top: float) -> list[Node]:
    """Both halves of the box, cut at the threshold that explains most of the gap."""
    child = replace(node, depth=node.depth + 1, prediction=None, again=False)
    p_gap, d_gap = weigh_gaps(pair, node, box, p_top, d_top)
    if p_gap >= d_gap:
        middle = _find_middle(box.p_low, p_top)
        return [replace(child, box=replace(box, p_high=middle)), replace(child, box=replace(box, p_low=middle))]
    middle = _find_middle(box.d_low, d_top)
    return [replace(child, box=replace(box, d_high=middle)), replace(child, box=replace(box, d_low=middle))]


def cut_above(pair: Pair, node: Node, room: float) -> Box:
    """The node's box without thresholds so high that they alone raise its own bound by `room`."""
    box = node.box
    p_high, d_high = box.p_high, box.d_high
    if pair.slow > 0:
        p_high = min(p_high, box.p_low + room / pair.slow)
    _, slowest = round_weights(pair, node.duals.w)
    if slowest > 0:
        d_high = min(d_high, box.d_low + room / slowest)
    return Box(box.p_low, p_high, box.d_low, d_high)


def _find_middle(low: float, high: float) -> float:
    """Halfway, geometrically where the interval spans more than a factor of four."""
    return math.sqrt(low * high) if low > 0 and high > 4 * low else (low + high) / 2
