"""What the search splits: boxes of thresholds with their duals, the numbers of one micro-batch pair, the target."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_llmpq.planner.arrays import PairArrays
from ds_llmpq.planner.incumbent import Incumbent, sufficient_bound
from ds_llmpq.planner.objective import Prediction
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


class Multipliers:
    """The multipliers of one micro-batch pair and their priced layers: all of a relaxation that changes, as paths are
    rounded. More of them never weaken a bound. `pools[q]` [M, 3]: of the limits on P, D and memory for kind q of
    device."""

    def __init__(self, stages: StageBounds):
        self._stages = stages
        self.pools = [stages.first_multipliers(q) for q in range(stages.kinds)]
        self._known: tuple[float, list[np.ndarray]] | None = None  # theta and its tables: splits seldom change theta

    def at(self, theta: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per kind the pool [M, 3] and `StageBounds.price_layers` [M, L, K] of it."""
        if self._known is None or self._known[0] != theta:
            self._known = theta, [self._stages.price_layers(q, pool, theta) for q, pool in enumerate(self.pools)]
        return list(zip(self.pools, self._known[1], strict=True))

    def add(self, q: int, multipliers: np.ndarray) -> None:
        """Put multipliers [m, 3] into the pool of a kind."""
        self.pools[q] = np.concatenate([self.pools[q], multipliers])
        if self._known is not None:
            theta, tables = self._known
            tables[q] = np.concatenate([tables[q], self._stages.price_layers(q, multipliers, theta)])


@dataclass(frozen=True)
class Pair:
    """What the search keeps for one micro-batch pair. Its bounds are built when a box of it is first looked at."""

    arrays: PairArrays
    build: Callable[[], StageBounds]
    link: np.ndarray  # [2, C, C]
    back: np.ndarray  # [2, C, C]
    slow: float  # weight of the slowest prefill resource, m_p - 1
    ring: float  # weight of a decode pass
    slowest: float  # weight of the slowest decode resource
    root: Box

    @cached_property
    def stages(self) -> StageBounds:
        return self.build()

    @cached_property
    def multipliers(self) -> Multipliers:
        """The only part that changes: it grows as paths are rounded."""
        return Multipliers(self.stages)


def round_weights(pair: Pair, w: float) -> tuple[float, float]:
    """Weights of (ring, slowest decode resource) under the share w."""
    return (1 - w) * pair.ring, w * pair.slowest


@dataclass(frozen=True)
class Target:
    """The bound at which a box need not be looked at: a better plan lowers it. `ceiling`: what no plan can reach."""

    best: Incumbent
    gap: float
    ceiling: float

    @property
    def value(self) -> float:
        """What has at least this bound holds no plan that improves on the incumbent by more than the gap."""
        return sufficient_bound(self.best.value, self.gap) if math.isfinite(self.best.value) else self.ceiling

    def met_by(self, bound: float) -> bool:
        """Whether a proven bound on all plans, or the incumbent's own, closes the gap."""
        return self.best.value <= bound or self.best.is_within(self.gap)
