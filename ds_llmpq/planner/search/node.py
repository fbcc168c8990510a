"""What the search splits: boxes of thresholds with their duals, and the numbers of one micro-batch pair."""

import math
from dataclasses import dataclass

import numpy as np

from ds_llmpq.planner.arrays import PairArrays
from ds_llmpq.planner.objective import Prediction
from ds_llmpq.planner.search.multipliers import Multipliers
from ds_llmpq.planner.search.stage_bounds import Box, StageBounds


@dataclass(frozen=True)
class Duals:
    """theta: price of quality loss; w: share of the slowest resource in a decode round; prices: of device classes."""

    theta: float
    w: float
    prices: tuple[float, ...]


@dataclass(frozen=True)
class Guess:
    """The theta to begin with; `near`: it is the price of a fractional optimum, not only plausible."""

    theta: float
    near: bool


@dataclass(frozen=True)
class Node:
    """A box of one micro-batch pair with its proven bound and what its best path looked like."""

    pair: int
    box: Box
    duals: Duals
    bound: float = 0.0
    own: float = -math.inf  # the bound that these duals give in this box; `bound` may come from others
    prediction: Prediction | None = None
    used: tuple[int, ...] = ()
    depth: int = 0
    exact: frozenset[tuple[int, int]] = frozenset()  # (kind, length) of stages to cost exactly
    settled: bool = False  # its duals have been improved
    again: bool = False  # nothing is left to split: settled once more with a thorough search for theta


@dataclass(frozen=True)
class Pair:
    """What the search keeps for one micro-batch pair."""

    arrays: PairArrays
    stages: StageBounds
    multipliers: Multipliers  # the only part that changes: it grows as paths are rounded
    link: np.ndarray  # [2, C, C]
    back: np.ndarray  # [2, C, C]
    slow: float  # weight of the slowest prefill resource, m_p - 1
    ring: float  # weight of a decode pass
    slowest: float  # weight of the slowest decode resource
    root: Box


def round_weights(pair: Pair, w: float) -> tuple[float, float]:
    """Weights of (ring, slowest decode resource) under the share w."""
    return (1 - w) * pair.ring, w * pair.slowest
