"""Prices of device classes: maximise a concave, piecewise linear bound by cutting planes in a trust region.

With many devices of many types their numbers cannot be counted in the states; a price on each use of a class, less the
price of all its members, bounds the cost instead. The best prices are found by evaluating the shortest path (value and
overuse are a cut) and solving a small linear program over the cuts, near the best prices so far.
"""

import math
from collections.abc import Callable

import numpy as np

from ds_llmpq.planner.linear import minimise

Evaluate = Callable[[np.ndarray], tuple[float, np.ndarray]]


def best_prices(
    evaluate: Evaluate,
    start: np.ndarray,
    *,
    rounds: int,
    goal: float,
    tolerance: float,
    late: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Prices [C] >= 0 of (nearly) the greatest value.

    `evaluate(prices)` gives the value and its slope [C] (uses minus members; None when nothing is possible). Stops when
    the value reaches `goal`, when the cuts promise less than `tolerance` more, or when it is `late`.
    """
    prices = start
    value, slope = evaluate(prices)
    if start.any():
        free, other = evaluate(0 * start)
        if free > value:  # what another box has taught does not help here
            prices, value, slope = 0 * start, free, other
    if slope is None:
        return prices
    best, center, radius = value, prices, 0.05 * abs(value) / max(1, len(start)) + 1e-12
    cuts = [(value - float(slope @ prices), slope)]
    for _ in range(rounds):
        if best >= goal or late():
            break
        promised, prices = _maximise(cuts, center, radius)
        if promised - best <= tolerance:
            radius *= 4  # nothing more nearby: look further, once
            promised, prices = _maximise(cuts, center, radius)
            if promised - best <= tolerance:
                break
        value, slope = evaluate(prices)
        if slope is None:
            return prices
        cuts.append((value - float(slope @ prices), slope))
        radius *= 1.5 if value > best else 0.6
        if value > best:
            best, center = value, prices
    return center


def _maximise(cuts: list[tuple[float, np.ndarray]], center: np.ndarray, radius: float) -> tuple[float, np.ndarray]:
    """The greatest value the cuts allow within the trust region, and where."""
    rows = np.array([np.concatenate([[1.0], -slope]) for _, slope in cuts])
    sides = np.array([constant for constant, _ in cuts])
    low = np.concatenate([[-np.inf], np.maximum(center - radius, 0.0)])
    high = np.concatenate([[np.inf], center + radius])
    solved = minimise(np.concatenate([[-1.0], 0.0 * center]), rows, sides, low, high)
    if solved is None:
        return -math.inf, center
    return -solved.objective, np.maximum(solved.x[1:], 0.0)
