"""A first bound at once: layers may be split between devices and bit widths, and the order of devices is ignored.

Two relaxations of one micro-batch pair, both valid for every plan. `simple_bound` is arithmetic alone: total work over
total speed. `solve_fractional` is a linear program over x[q, b], the layers that devices of kind q hold at width b, and
y[g, b], the layers of group g at width b; it knows memory, quality and the limit of the mode, takes milliseconds, and
its optimum also says where good plans lie: the slowest resources to aim at and the prices of the limits.
"""

import math
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.feasibility import pairs
from ds_llmpq.planner.linear import Infeasible, minimise
from ds_llmpq.planner.objective import charge_head
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem

MOST_GROUPS = 256  # of consecutive layers; beyond, the least loss in a group stands for its layers
SLACK = 1e-6  # relative, what the linear program's own tolerances may be wrong by


@dataclass(frozen=True)
class Fractional:
    """The optimum for one pair, in units of the objective. `bound` is infinite if even fractions keep no limit.

    `slowest_prefill` and `slowest_decode`: seconds that the slowest resource may take; `share`: the part of a decode
    round's price that falls on the slowest resource; `theta`: the price of quality loss in seconds. None: not known.
    """

    bound: float
    slowest_prefill: float | None = None
    slowest_decode: float | None = None
    share: float | None = None
    theta: float | None = None


def simple_bound(problem: Problem, pins: Pins, pair: tuple[int, int]) -> float:
    """What no plan of this pair undercuts: each layer at its fastest, the slowest stage at perfect balance."""
    relaxed = _Kinds(problem, pins, pair)
    if not relaxed.usable.any():
        return math.inf
    loss = float(np.where(relaxed.allowed, relaxed.sensitivity, np.inf).min(axis=1).sum())
    mode = problem.objective.mode
    if mode == "max_latency":
        return loss * (1 - SLACK)
    seconds = relaxed.constant
    slowest = [relaxed.least_slowest(phase) for phase in (0, 1)]
    least = [float(np.where(relaxed.usable, relaxed.seconds[phase], np.inf).min()) for phase in (0, 1)]
    seconds += relaxed.layers * least[0] + relaxed.slow * slowest[0]
    passes = relaxed.ring * relaxed.layers * least[1]
    rounds = relaxed.slowest * slowest[1]
    seconds += max(passes, rounds)
    return (seconds + problem.objective.theta * loss) * (1 - SLACK)


def solve_fractional(problem: Problem, pins: Pins, pair: tuple[int, int]) -> Fractional:
    """The linear program of one pair."""
    relaxed = _Kinds(problem, pins, pair)
    if not relaxed.usable.any():
        return Fractional(math.inf)
    return _Program(problem, relaxed).solve()


class _Kinds:
    """The numbers of one pair by kind of device, those that cannot hold even the workspace left out."""

    def __init__(self, problem: Problem, pins: Pins, pair: tuple[int, int]):
        arrays = pair_arrays(problem, *pair)
        first: dict[tuple[str, float], int] = {}
        counts: dict[tuple[str, float], int] = {}
        for d, device in enumerate(problem.devices):
            key = (device.type, device.memory_bytes)
            if arrays.capacity[d] >= 0:
                first.setdefault(key, d)
                counts[key] = counts.get(key, 0) + 1
        rows = list(first.values())
        self.layers, self.widths = arrays.sensitivity.shape
        self.counts = np.array(list(counts.values()), dtype=float)
        self.usable = arrays.available[rows].reshape(len(rows), self.widths)
        self.seconds = (arrays.prefill[rows], arrays.decode[rows])
        self.embed, self.head = arrays.embed[:, rows], arrays.head[:, rows]
        self.capacity = arrays.capacity[rows]
        self.bytes = arrays.layer_bytes.min(axis=0)
        self.allowed, self.sensitivity = pins.widths(problem), arrays.sensitivity
        self.slow = arrays.prefill_rounds - 1.0
        self.ring = arrays.generated_tokens - 1.0
        self.slowest = self.ring * arrays.decode_rounds
        self.stages = self._least_stages(arrays)
        self.embed_bytes = arrays.embed_bytes
        self.head_bytes = charge_head(arrays, first=self.stages == 1, last=True)
        self.constant = self.hops = 0.0
        if self.stages > 1:
            self.constant, self.hops = self._links(arrays)

    def _least_stages(self, arrays: PairArrays) -> int:
        """How many devices are needed at least to hold all layers at the smallest widths."""
        smallest = np.where(self.usable, self.bytes, np.inf).min(axis=1, initial=np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            holds = np.nan_to_num(np.floor(self.capacity / smallest * (1 + 1e-9)), nan=self.layers)
        holds = np.repeat(np.clip(holds, 0, self.layers), self.counts.astype(int))
        reached = np.cumsum(np.sort(holds)[::-1])
        return int(np.searchsorted(reached, self.layers)) + 1

    def _links(self, arrays: PairArrays) -> tuple[float, float]:
        """Seconds of prefill, and of one decode pass, spent on the fewest, fastest links."""
        apart = ~np.eye(arrays.link.shape[1], dtype=bool)
        if not apart.any():
            return 0.0, 0.0
        times = [
            (self.stages - 1) * float(arrays.link[phase][apart].min()) + float(arrays.back[phase][apart].min())
            for phase in (0, 1)
        ]
        return times[0], times[1]

    def least_slowest(self, phase: int) -> float:
        """Seconds of the slowest stage if all devices shared the layers perfectly, or held one layer more than fits."""
        fastest = np.where(self.usable, self.seconds[phase], np.inf).min(axis=1)
        if (fastest <= 0).any():
            return 0.0
        balanced = self.layers / float((self.counts / fastest).sum())
        return max(balanced, -(-self.layers // int(self.counts.sum())) * float(fastest.min()))


class _Program:
    """Columns x [Q, B], y [G, B], embed [Q], head [Q], then P, D and R: the slowest resources and the decode rounds."""

    def __init__(self, problem: Problem, kinds: _Kinds):
        self.kinds, self.objective = kinds, problem.objective
        starts = np.arange(0, kinds.layers, -(-kinds.layers // MOST_GROUPS))
        self.group = np.diff(np.append(starts, kinds.layers)).astype(float)
        loss = np.where(kinds.allowed, kinds.sensitivity, np.inf)
        self.loss = np.minimum.reduceat(loss, starts, axis=0)
        sizes = [len(kinds.counts) * kinds.widths, len(starts) * kinds.widths, len(kinds.counts), len(kinds.counts)]
        edges = np.cumsum([0, *sizes])
        self.x, self.y, self.embed, self.head = (slice(*ends) for ends in pairwise(edges))
        self.p, self.d, self.r = range(edges[-1], edges[-1] + 3)
        self.columns = int(edges[-1]) + 3
        self.seconds = [np.where(kinds.usable, table, 0.0) for table in kinds.seconds]
        self.ends = [
            [np.where(np.isfinite(t[phase]), t[phase], 0.0) for t in (kinds.embed, kinds.head)] for phase in (0, 1)
        ]
        self.low, self.high = self._bounds()
        self.rows: list[np.ndarray] = []
        self.sides: list[float] = []

    def solve(self) -> Fractional:
        self._add_resources()
        rounds = self._add_decode_rounds()
        cost = self._cost_and_limit()
        scales = np.array([np.abs(row).max() or 1.0 for row in self.rows])
        upper, sides = np.array(self.rows) / scales[:, None], np.array(self.sides) / scales
        equal, totals = self._equalities()
        unit = np.abs(cost).max() or 1.0
        try:
            found = minimise(cost / unit, upper, sides, self.low, self.high, equal, totals)
        except Infeasible:
            return Fractional(math.inf)
        if found is None:
            return Fractional(0.0)
        # Weak duality, in our own arithmetic: whatever the solver's tolerances, any prices >= 0 give a bound.
        prices, free = unit * np.maximum(-found.upper_prices, 0.0), unit * found.equal_prices
        reduced = cost + upper.T @ prices - equal.T @ free
        bound = free @ totals - prices @ sides + reduced @ np.where(reduced > 0, self.low, self.high)
        prices = prices / scales
        share = prices[rounds[0]] / prices[rounds].sum() if prices[rounds].any() else 0.5
        slowest = self._slowest(found.x)
        bound += 0.0 if self.objective.mode == "max_latency" else self.kinds.constant
        return Fractional(max(0.0, float(bound)) * (1 - SLACK), *slowest, float(share), self._theta(float(prices[-1])))

    def _slowest(self, x: np.ndarray) -> tuple[float, float]:
        """Seconds that the slowest resources may take without costing more than the optimum does."""
        kinds = self.kinds
        prefill = x[self.p] if kinds.slow > 0 else self.high[self.p]
        decode = x[self.d] if kinds.slowest > 0 else self.high[self.d]
        if kinds.slowest > 0:
            decode = max(decode, x[self.r] / kinds.slowest)
        return float(prefill), float(decode)

    def _theta(self, price: float) -> float | None:
        """The price of quality loss in seconds, from the dual of the mode's limit."""
        mode, theta = self.objective.mode, self.objective.theta
        if mode == "theta":
            return theta
        if mode == "max_quality_loss":
            return max(price, 0.0) + theta or None
        return 1 / price if price > 0 else None

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of all columns, finite: no plan needs more."""
        kinds = self.kinds
        low, high = np.zeros(self.columns), np.zeros(self.columns)
        high[self.x] = np.where(kinds.usable, kinds.layers, 0.0).ravel()
        high[self.y] = np.where(np.isfinite(self.loss), self.group[:, None], 0.0).ravel()
        high[self.embed] = np.isfinite(kinds.embed).all(axis=0)
        high[self.head] = np.isfinite(kinds.head).all(axis=0)
        low[self.p], low[self.d] = (kinds.least_slowest(phase) for phase in (0, 1))
        most = [
            self.seconds[phase].max() * kinds.layers + sum(end.max() for end in self.ends[phase]) for phase in (0, 1)
        ]
        high[self.p], high[self.d] = most
        high[self.r] = (kinds.ring + kinds.slowest) * most[1] + kinds.ring * kinds.hops
        return low, np.maximum(high, low)

    def _pass(self, phase: int) -> np.ndarray:
        """Seconds of one micro-batch through all stages."""
        row = np.zeros(self.columns)
        row[self.x] = self.seconds[phase].ravel()
        row[self.embed], row[self.head] = self.ends[phase]
        return row

    def _add(self, row: np.ndarray, side: float) -> None:
        """row @ columns <= side."""
        self.rows.append(row)
        self.sides.append(side)

    def _add_resources(self) -> None:
        """Devices of a kind are no slower together than their number times the slowest one, and hold what fits."""
        kinds = self.kinds
        size = np.where(kinds.usable, kinds.bytes, 0.0)
        for q, count in enumerate(kinds.counts):
            own = np.zeros(self.columns)
            own[self.x][q * kinds.widths : (q + 1) * kinds.widths] = 1.0
            own[self.embed.start + q] = own[self.head.start + q] = 1.0
            for phase, column in ((0, self.p), (1, self.d)):
                row = own * self._pass(phase)
                row[column] = -count
                self._add(row, 0.0)
            row = np.zeros(self.columns)
            row[self.x][q * kinds.widths : (q + 1) * kinds.widths] = size[q]
            row[self.embed.start + q], row[self.head.start + q] = kinds.embed_bytes, kinds.head_bytes
            self._add(row, count * kinds.capacity[q] * (1 + SLACK))

    def _add_decode_rounds(self) -> list[int]:
        """R is no less than the slowest resource's work and one micro-batch's passes; the two rows, in that order."""
        kinds, first = self.kinds, len(self.rows)
        slowest, ring = np.zeros(self.columns), kinds.ring * self._pass(1)
        slowest[self.d] = kinds.slowest
        for row in (slowest, ring):
            row[self.r] = -1.0
            self._add(row, -kinds.ring * kinds.hops if row is ring else 0.0)
        return [first, first + 1]

    def _cost_and_limit(self) -> np.ndarray:
        """The mode's cost of each column; the other of latency and loss becomes the last row, if it is limited."""
        kinds, mode, limit = self.kinds, self.objective.mode, self.objective.limit * (1 + SLACK)
        latency, loss = self._pass(0), np.zeros(self.columns)
        latency[self.p], latency[self.r] = kinds.slow, 1.0
        loss[self.y] = np.where(np.isfinite(self.loss), self.loss, 0.0).ravel()
        if mode == "max_latency":
            self._add(latency, limit - kinds.constant)
            return loss
        if mode == "max_quality_loss":
            self._add(loss, limit)
        return latency + self.objective.theta * loss

    def _equalities(self) -> tuple[np.ndarray, np.ndarray]:
        """Every layer has one bit width, bit widths are the same on both sides, one embedding, one head."""
        kinds, groups = self.kinds, len(self.group)
        rows = np.zeros((groups + kinds.widths + 2, self.columns))
        for g in range(groups):
            rows[g, self.y][g * kinds.widths : (g + 1) * kinds.widths] = 1.0
        for b in range(kinds.widths):
            rows[groups + b, self.y][b :: kinds.widths] = 1.0
            rows[groups + b, self.x][b :: kinds.widths] = -1.0
        rows[-2, self.embed] = rows[-1, self.head] = 1.0
        return rows, np.concatenate([self.group, np.zeros(kinds.widths), [1.0, 1.0]])


Fractionals = dict[tuple[int, int], Fractional]


def first_bounds(problem: Problem, pins: Pins, deadline: float = math.inf) -> Fractionals:
    """Micro-batch pair -> what is known of it, the most promising first; after the deadline by arithmetic alone."""
    found = {pair: Fractional(simple_bound(problem, pins, pair)) for pair in pairs(problem)}
    for pair in sorted(found, key=lambda pair: found[pair].bound):
        if time.monotonic() > deadline:
            break
        solved = solve_fractional(problem, pins, pair)
        found[pair] = max(solved, found[pair], key=lambda entry: entry.bound)
    return dict(sorted(found.items(), key=lambda entry: entry[1].bound))
