"""Lower bounds on what a stage costs, for all layer intervals and device kinds at once.

A stage holding layers [a, a + k) chooses one bit width a layer and pays P + a_D * D + theta * loss, subject to
P <= P_high, D <= D_high and memory <= capacity. With multipliers on the three constraints the choice falls apart into
one minimum a layer, so prefix sums give the Lagrangian bound of every interval:

    bound(a, k) = max over (l_P, l_D, l_M) of  S[a + k] - S[a] - (l_P - 1) P_high - (l_D - a_D) D_high - l_M capacity,
    S[i + 1] - S[i] = min over bit widths b of  l_P P_b + l_D D_b + l_M bytes[i, b] + theta * loss[i, b].

The multipliers are a pool per device kind that grows where they are needed (`node.Multipliers`); S does not depend
on the box, only the constants do. A "kind" is a set of devices with equal times and capacity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ds_llmpq.planner.arrays import PairArrays
from ds_llmpq.planner.objective import charge_head
from ds_llmpq.planner.search.compositions import Compositions, StageCosts

NEVER = 1e30  # an absent bit width; finite, so that zero weights stay harmless


@dataclass(frozen=True)
class Box:
    """Thresholds of the search: the slowest prefill resource lies in [p_low, p_high], decode likewise."""

    p_low: float
    p_high: float
    d_low: float
    d_high: float


@dataclass(frozen=True)
class Prices:
    """Under which prices a stage is bounded: theta of quality loss, `pass_weight` a_D of a decode pass."""

    theta: float
    pass_weight: float


class StageBounds:
    """The bounds of one micro-batch pair, which do not change. `representatives[q]` is a device index of kind q.

    `allowed[L, B]` removes bit widths, `masks[q]` ([L, L] bool or None) removes stages (a, k - 1): both from pins.
    """

    def __init__(
        self,
        arrays: PairArrays,
        representatives: list[int],
        allowed: np.ndarray,
        masks: list[np.ndarray | None],
        compositions: Compositions,
    ):
        self.arrays, self.allowed, self.masks, self.compositions = arrays, allowed, masks, compositions
        self.kinds = len(representatives)
        a, reps = arrays, representatives
        self.layers, self.widths = a.sensitivity.shape
        self.unit = max(float(a.capacity.max()), 1.0)  # bytes in one unit of l_M's constraint
        self.bytes = a.layer_bytes / self.unit
        usable = a.available[reps]
        self.usable = usable
        self.prefill = np.where(usable, a.prefill[reps], 0.0)
        self.decode = np.where(usable, a.decode[reps], 0.0)
        self.absent = np.where(usable, 0.0, NEVER)
        self.blocked = np.where(self.allowed, 0.0, NEVER)
        self.capacity = a.capacity[reps] / self.unit
        self.embed = np.where(np.isfinite(a.embed[:, reps]), a.embed[:, reps], NEVER)
        self.head = np.where(np.isfinite(a.head[:, reps]), a.head[:, reps], NEVER)
        self.embed_bytes = a.embed_bytes / self.unit
        self.costs = [
            StageCosts(self.compositions, self.prefill[q] + self.absent[q], self.decode[q] + self.absent[q], self.bytes)
            for q in range(len(reps))
        ]
        self.longest = max(self._longest(q) for q in range(len(reps)))
        self.end = np.minimum(np.arange(self.layers)[:, None] + np.arange(1, self.longest + 1), self.layers)
        self.least = [self._least(q) for q in range(len(reps))]

    def first_multipliers(self, q: int) -> np.ndarray:
        """[M, 3]: a coarse grid around the plausible prices: of a second of the slowest stage, and of all memory."""
        a = self.arrays
        slow = a.prefill_rounds - 1.0
        passes = max(a.generated_tokens - 1.0, 1.0)
        rounds = passes * a.decode_rounds
        use = self.usable[q]
        seconds = 0.0
        if use.any():
            seconds = self.layers * ((1 + slow) * self.prefill[q, use].mean() + rounds * self.decode[q, use].mean())
        if not seconds:  # nothing takes time: loss is all that memory can be worth
            seconds = float(np.ptp(a.sensitivity, axis=1).sum())
        grid = [
            (1 + p * slow, d, m * seconds)
            for p in (0.0, 0.3)
            for d in (0.0, 0.5 * passes, passes, passes + 0.15 * rounds, passes + 0.5 * rounds)
            for m in (0.0, 0.03, 0.3)
        ]
        return np.array(grid)

    def _longest(self, q: int) -> int:
        """The most layers that fit the memory of a kind at the smallest bit widths; at least 1."""
        least = np.where(self.usable[q] & self.allowed, self.bytes, NEVER).min(axis=1)
        used = np.concatenate([[0.0], np.cumsum(np.minimum(least, NEVER))])
        room = used[:-1] + self.capacity[q] * (1 + 1e-9) + 1e-12
        reach = np.searchsorted(used, room, side="right") - 1 - np.arange(self.layers)
        return max(1, int(reach.max()))

    def _least(self, q: int) -> np.ndarray:
        """[3, L, K]: the least P, D and bytes any allowed bit widths need: quick infeasibility."""
        penalty = self.absent[q] + self.blocked  # [L, B]
        parts = np.stack([self.prefill[q] + penalty, self.decode[q] + penalty, self.bytes + penalty])
        return self._differences(_prefix_sums(parts.min(axis=2)))

    def price_layers(self, q: int, pool: np.ndarray, theta: float) -> np.ndarray:
        """[M, L, K] at (a, k - 1): S[a + k] - S[a], least l_P P + l_D D + l_M bytes + theta * loss of the layers."""
        base = pool[:, :1] * self.prefill[q] + pool[:, 1:2] * self.decode[q] + self.absent[q]
        by_bits = (  # [M, L, B]
            base[:, None, :]
            + pool[:, 2, None, None] * self.bytes
            + (theta * self.arrays.sensitivity + self.blocked)[None]
        )
        return self._differences(_prefix_sums(by_bits.min(axis=2)))

    def _differences(self, sums: np.ndarray) -> np.ndarray:
        """[M, L, K]: sums[a + k] - sums[a] at (a, k - 1), cut at the last layer."""
        return sums[:, self.end] - sums[:, : self.layers, None]

    def limits(self, q: int, box: Box, first: bool, last: bool) -> np.ndarray:
        """[3]: what P, D and memory (in units) the layers of such a stage may take."""
        head = charge_head(self.arrays, first, last) / self.unit
        return np.array(
            [
                box.p_high - first * self.embed[0, q] - last * self.head[0, q],
                box.d_high - first * self.embed[1, q] - last * self.head[1, q],
                self.capacity[q] - first * self.embed_bytes - head,
            ]
        )

    def ends_cost(self, q: int, pass_weight: float, first: bool, last: bool) -> float:
        """P + a_D * D of embedding and head."""
        cost = first * (self.embed[0, q] + pass_weight * self.embed[1, q])
        return cost + last * (self.head[0, q] + pass_weight * self.head[1, q])

    def bounds(
        self,
        box: Box,
        prices: Prices,
        multipliers: Sequence[tuple[np.ndarray, np.ndarray]],
        exact: frozenset[tuple[int, int]] = frozenset(),
    ) -> np.ndarray:
        """[Q, L, K]: lower bounds of stages [a, a + k) at index (a, k - 1); infinite where impossible.

        `multipliers`: per kind the pool [M, 3] and its `price_layers` at the same theta. `exact` holds (kind, length)
        whose costs are to be exact beyond the short lengths.
        """
        found = []
        for q, (pool, table) in enumerate(multipliers):
            bound = self._lagrangian(q, box, prices.pass_weight, pool, table)
            self._raise_short(q, box, prices, bound)
            for length in (length for kind, length in exact if kind == q):
                self._raise_long(q, length, box, prices, bound)
            bound[self._impossible(q, box)] = np.inf
            if self.masks[q] is not None:
                bound[~self.masks[q][:, : self.longest]] = np.inf
            found.append(bound)
        return np.stack(found)

    def _lagrangian(self, q: int, box: Box, pass_weight: float, pool: np.ndarray, table: np.ndarray) -> np.ndarray:
        """[L, K]: the best bound that the multipliers `pool` with their priced layers `table` give."""
        base = np.array([1.0, pass_weight, 0.0])
        surplus = pool - base
        keep = (surplus >= -1e-12).all(axis=1)
        surplus, table = surplus[keep], table[keep]

        def worst(part: np.ndarray, first: bool, last: bool) -> np.ndarray:
            constants = surplus @ self.limits(q, box, first, last)
            rise = part - constants.reshape(-1, *[1] * (part.ndim - 1))
            return rise.max(axis=0) + self.ends_cost(q, pass_weight, first, last)

        return self._by_place(table, worst)

    def _by_place(self, table: np.ndarray, reduce: Callable[[np.ndarray, bool, bool], np.ndarray]) -> np.ndarray:
        """[L, K] from [M, L, K]: `reduce(part, first, last)` of the stages inside, at either end, and of the whole."""
        found = reduce(table, False, False)
        found[0] = reduce(table[:, 0], True, False)
        length = np.arange(1, self.longest + 1)
        first = self.layers - length
        found[first, length - 1] = reduce(table[:, first, length - 1], False, True)
        if self.longest == self.layers:
            found[0, -1] = reduce(table[:, 0, -1], True, True)
        return found

    def _raise_short(self, q: int, box: Box, prices: Prices, bound: np.ndarray) -> None:
        """Put the exact costs of short stages in place."""
        costs, short = self.costs[q], min(self.compositions.short, self.longest)
        if not short:
            return
        lengths = np.arange(1, self.compositions.short + 1)
        start, end = np.zeros_like(lengths), self.layers - lengths

        def least(first: bool, last: bool, at: np.ndarray | None) -> np.ndarray:
            limits = self.limits(q, box, first, last)
            found = costs.least_short(limits, prices.pass_weight, prices.theta, at)
            return found + self.ends_cost(q, prices.pass_weight, first, last)

        found = least(False, False, None)
        found[:, 0] = least(True, False, start)[:, 0]
        found[lengths - 1, end] = least(False, True, end)[:, 0]
        if short == self.layers:
            found[-1, 0] = least(True, True, start)[-1, 0]
        np.maximum(bound[:, :short], found[:short].T, out=bound[:, :short])

    def _raise_long(self, q: int, length: int, box: Box, prices: Prices, bound: np.ndarray) -> None:
        """Put the exact costs of one longer length in place."""
        costs, ends, pass_weight = self.costs[q], self.layers - length, prices.pass_weight
        found = costs.least(length, self.limits(q, box, False, False), pass_weight, prices.theta)
        for first in {0, ends}:
            at_start, at_end = first == 0, first == ends
            limits = self.limits(q, box, at_start, at_end)
            found[first] = costs.least(length, limits, pass_weight, prices.theta)[first]
            found[first] += self.ends_cost(q, pass_weight, at_start, at_end)
        bound[:, length - 1] = np.maximum(bound[:, length - 1], found)

    def _impossible(self, q: int, box: Box) -> np.ndarray:
        """[L, K] bool: even the least possible P, D or memory exceeds its limit, or the interval leaves the model."""

        def over(part: np.ndarray, first: bool, last: bool) -> np.ndarray:
            limits = self.limits(q, box, first, last)
            room = limits + np.abs(limits) * 1e-9 + 1e-15
            return (part > room.reshape(-1, *[1] * (part.ndim - 1))).any(axis=0)

        bad = self._by_place(self.least[q], over)
        bad[np.arange(self.layers)[:, None] + np.arange(self.longest) >= self.layers] = True
        return bad


def _prefix_sums(rows: np.ndarray) -> np.ndarray:
    """[M, L + 1] from [M, L]."""
    sums = np.zeros((len(rows), rows.shape[1] + 1))
    np.cumsum(rows, axis=1, out=sums[:, 1:])
    return sums
