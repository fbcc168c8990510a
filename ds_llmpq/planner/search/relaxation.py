"""What a box of thresholds costs at least: one shortest path over priced stages, whatever the order of the devices.

For thresholds in a box [p_low, p_high] x [d_low, d_high] the problem separates by stages, and one shortest path covers
all device orders, subsets and interleavings (`shortest_path.py`); stages are bounded by Lagrangian prices
(`stage_bounds.py`). The decode round max(m_d * slowest, ring) is bounded by w * m_d * slowest + (1 - w) * ring for any
w in [0, 1]; a limit on quality loss (or on latency) is priced by theta: min latency + theta * (loss - limit) is a
bound for every theta. Where the objective prices the loss too, theta is both prices together.
Where devices are too many to count, each use of a class is priced. Every path rounds to a plan.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.feasibility import furthest_layer, pairs
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.search.beam import search_beam
from ds_llmpq.planner.search.compositions import Compositions
from ds_llmpq.planner.search.device_classes import Classes, class_links, group
from ds_llmpq.planner.search.dual_prices import best_prices
from ds_llmpq.planner.search.node import Node, Pair, round_weights
from ds_llmpq.planner.search.rounding import Place, choose_bits, find_multipliers
from ds_llmpq.planner.search.shortest_path import PathSpace, PathStep
from ds_llmpq.planner.search.stage_bounds import NEVER, Box, Prices, StageBounds

STATE_LIMIT = 3000  # count states times classes beyond which device limits are priced instead of counted
POOL_LIMIT = 90


class Relaxation:
    """Bounds and paths of boxes, for all micro-batch pairs. `round_path` adds multipliers to pairs, and nothing else
    changes what a node's bound is."""

    def __init__(
        self,
        problem: Problem,
        pins: Pins,
        chosen: Sequence[tuple[int, int]] | None = None,
        deadline: float = math.inf,
    ):
        """`chosen`: the micro-batch pairs to look at, in this order; None means all that memory permits."""
        self.problem, self.pins, self.deadline = problem, pins, deadline
        self.mode = problem.objective.mode
        fixed = problem.device_order == "fixed"
        self.classes, self.space, self.priced = _state_space(problem, pins, fixed)
        self.order_links = np.where(np.tri(len(self.classes.members), dtype=bool), np.inf, 0.0) if fixed else 0.0
        self.compositions: Compositions | None = None  # the same for all micro-batch pairs
        self.pairs = [
            self._pair(pair)
            for pair in (pairs(problem) if chosen is None else chosen)
            if furthest_layer(problem, *pair) == problem.layers
        ]
        self.evaluated = 0

    def _pair(self, pair: tuple[int, int]) -> Pair:
        arrays = pair_arrays(self.problem, *pair)
        rounds = arrays.generated_tokens - 1
        # a class without a second member cannot follow itself
        link, back = (np.minimum(class_links(table, self.classes), NEVER) for table in (arrays.link, arrays.back))
        return Pair(
            arrays,
            partial(self._bound_stages, arrays),
            link,
            back,
            slow=arrays.prefill_rounds - 1.0,
            ring=float(rounds),
            slowest=float(rounds * arrays.decode_rounds),
            root=_root_box(arrays),
        )

    def _bound_stages(self, arrays: PairArrays) -> StageBounds:
        representatives = self.classes.representatives()
        allowed = self.pins.widths(self.problem)
        if self.compositions is None:
            self.compositions = Compositions(arrays.sensitivity, allowed, NEVER)
        masks = [self.pins.intervals(self.problem, d) for d in representatives]
        return StageBounds(arrays, representatives, allowed, masks, self.compositions)

    def evaluate(self, node: Node) -> tuple[float, list[PathStep]]:
        """(bound in units of the objective, best path) of a node; the path is empty when nothing is possible."""
        self.evaluated += 1
        stage, link, final = self.tables(node)
        costs = self.space.costs_to_go(_cut(stage), link, final)
        if math.isinf(costs.least):
            return math.inf, []
        value = costs.least + self.constant(node)
        return self.in_objective_units(value - 1e-9 * abs(value), node.duals.theta), costs.path()

    def constant(self, node: Node) -> float:
        """What every plan in the box costs beside its stages: the low thresholds, less the prices of all devices."""
        pair = self.pairs[node.pair]
        _, slowest = round_weights(pair, node.duals.w)
        fixed = pair.slow * node.box.p_low + slowest * node.box.d_low
        return fixed - sum(p * count for p, count in zip(node.duals.prices, self.classes.counts, strict=True))

    def ring_weight(self, node: Node) -> float:
        """a_D: the weight of one decode pass."""
        return round_weights(self.pairs[node.pair], node.duals.w)[0]

    def tables(self, node: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stage costs [C, L, K], links [C, C] and what follows the last stage [C] for one node."""
        pair, box, duals = self.pairs[node.pair], node.box, node.duals
        ring, _ = round_weights(pair, duals.w)
        bounds = pair.stages.bounds(box, Prices(duals.theta, ring), pair.multipliers.at(duals.theta), node.exact)
        stage = bounds[self.classes.kind] + np.array(duals.prices)[:, None, None]
        link = pair.link[0] + ring * pair.link[1] + self.order_links
        slack = 1 + 1e-9
        link = np.where((pair.link[0] > box.p_high * slack) | (pair.link[1] > box.d_high * slack), np.inf, link)
        final = (pair.back[0] + ring * pair.back[1]).min(axis=1)
        final = np.where(final < NEVER, final, 0.0)
        if stage.shape[2] == stage.shape[1]:
            stage[:, 0, -1] -= final  # a single stage has no way back
        return stage, link, final

    def in_objective_units(self, value: float, theta: float) -> float:
        limit = self.problem.objective.limit
        if self.mode == "max_quality_loss":
            return value - (theta - self.problem.objective.theta) * limit
        if self.mode == "max_latency":
            return (value - limit) / theta
        return value

    def with_better_prices(self, node: Node, rounds: int, goal: float) -> Node:
        """The node with better prices of device classes; its other duals stay. `goal`: a bound that is enough."""
        bare = replace(node, duals=replace(node.duals, prices=(0.0,) * self.space.classes))
        stage, link, final = self.tables(bare)
        stage = _cut(stage)
        counts, constant = np.array(self.classes.counts), self.constant(bare)

        def value_and_slope(prices: np.ndarray) -> tuple[float, np.ndarray | None]:
            costs = self.space.costs_to_go(stage + prices[:, None, None], link, final)
            value = costs.least + constant - float(prices @ counts)
            if math.isinf(value):
                return value, None
            return value, np.bincount([step.kind for step in costs.path()], minlength=len(counts)) - counts

        reference = goal if math.isfinite(goal) else abs(constant)
        prices = best_prices(
            value_and_slope,
            np.array(node.duals.prices),
            rounds=rounds,
            goal=goal,
            tolerance=1e-3 * reference,
            late=lambda: time.monotonic() > self.deadline,
        )
        return replace(node, duals=replace(node.duals, prices=tuple(prices.tolist())))

    def round_path(self, node: Node, path: list[PathStep]) -> Assignment | None:
        """The path as a plan, None where it makes none; adds to the pair's multipliers."""
        pair, duals = self.pairs[node.pair], node.duals
        if self.priced:
            path = self._within_counts(node, path)
        ring, _ = round_weights(pair, duals.w)
        bits, pools = [], pair.multipliers.pools
        for step in path:
            q = self.classes.kind[step.kind]
            place = Place(pair.stages, q, step.first, step.last, node.box, Prices(duals.theta, ring))
            chosen, cost = choose_bits(place, pools[q])
            if step.last - step.first > pair.stages.compositions.short and len(pools[q]) < POOL_LIMIT:
                found = find_multipliers(place, pools[q], cost)
                if found is not None:
                    pair.multipliers.add(q, found[None])
            bits.append(chosen)
        if any(chosen is None for chosen in bits):
            return None
        devices = self._devices(pair, path)
        if devices is None:
            return None
        stages = tuple(
            StageAssignment(self.problem.devices[d].name, s.first, s.last, tuple(self.problem.bits[b] for b in chosen))
            for d, s, chosen in zip(devices, path, bits, strict=True)
        )
        return Assignment(stages, pair.arrays.prefill_micro_batch, pair.arrays.decode_micro_batch)

    def search_counted(self, node: Node) -> Assignment | None:
        """A plan of the node's box that a beam search finds, where devices are priced; see `beam.py`."""
        stage, link, final = self.tables(node)
        path = search_beam(self.space.costs_to_go(_cut(stage), link, final), self.classes.counts)
        return None if path is None else self.round_path(node, path)

    def _within_counts(self, node: Node, path: list[PathStep]) -> list[PathStep]:
        """Where devices are priced, a path may use too many: place all devices in a row, class by class in the order
        of the path, and take the best path along it."""
        seen = [[step.first for step in path if step.kind == c] for c in range(self.space.classes)]
        if all(len(steps) <= count for steps, count in zip(seen, self.classes.counts, strict=True)):
            return path
        middle = [np.mean(steps) if steps else self.problem.layers / 2 for steps in seen]
        row = [c for c in np.argsort(middle, kind="stable") for _ in range(self.classes.counts[c])]
        stage, link, final = self.tables(node)
        stage = _cut(stage) - np.array(node.duals.prices)[:, None, None]
        forward = np.where(np.tri(len(row), dtype=bool), np.inf, 0.0)
        costs = PathSpace(len(row), None).costs_to_go(stage[row], link[np.ix_(row, row)] + forward, final[row])
        if math.isinf(costs.least):
            return path
        return [replace(step, kind=int(row[step.kind])) for step in costs.path()]

    def _devices(self, pair: Pair, path: list[PathStep]) -> list[int] | None:
        """Members for the classes of a path: each the nearest unused one to its predecessor."""
        free = [list(devices) for devices in self.classes.members]
        chosen: list[int] = []
        cost = pair.arrays.link[0] + pair.ring * pair.arrays.link[1]
        for step in path:
            if not free[step.kind]:
                return None
            nearest = min(free[step.kind], key=lambda d: cost[chosen[-1], d] if chosen else 0.0)
            free[step.kind].remove(nearest)
            chosen.append(nearest)
        return chosen

    def ceiling(self) -> float:
        """More than the objective of any plan: a bound beyond it proves that a limit cannot be met."""
        return max((self._ceiling(pair) for pair in self.pairs), default=math.inf)

    def _ceiling(self, pair: Pair) -> float:
        worst = float(pair.arrays.sensitivity.max(axis=1).sum()) if pair.arrays.sensitivity.size else 0.0
        if self.mode != "max_latency":
            hops = min(self.problem.layers, len(self.problem.devices))
            box = pair.root
            latency = (2 * hops + pair.slow) * box.p_high + (2 * hops * pair.ring + pair.slowest) * box.d_high
            worst = latency + self.problem.objective.theta * worst
        return worst * (1 + 1e-6) + 1e-9


def _state_space(problem: Problem, pins: Pins, fixed: bool) -> tuple[Classes, PathSpace, bool]:
    """Classes and states; the third value tells that device limits are priced."""
    pinned = pins.device_indices(problem)
    if fixed:
        classes = group(problem, pinned, merge=False, single=True)
        return classes, PathSpace(len(classes.members), None), False
    for merge in (False, True):
        classes = group(problem, pinned, merge=merge)
        if classes.states * len(classes.members) <= STATE_LIMIT:
            return classes, PathSpace(len(classes.members), classes.counts), False
    return classes, PathSpace(len(classes.members), None), True


def _cut(stage: np.ndarray) -> np.ndarray:
    """[C, L, K] up to the greatest length with a finite cost."""
    finite = np.flatnonzero(np.isfinite(stage).any(axis=(0, 1)))
    return stage[..., : int(finite[-1]) + 1 if len(finite) else 1]


def _root_box(arrays: PairArrays) -> Box:
    """Thresholds between perfect balance over all devices at their fastest bit width, and everything on the slowest."""
    layers = len(arrays.sensitivity)
    edges = []
    for table, ends in (
        (arrays.prefill, arrays.embed[0] + arrays.head[0]),
        (arrays.decode, arrays.embed[1] + arrays.head[1]),
    ):
        usable = np.where(arrays.available, table, np.inf).min(axis=1)
        usable = usable[np.isfinite(usable)]
        low = layers / (1.0 / usable).sum() if len(usable) and (usable > 0).all() else 0.0
        finite = np.where(arrays.available, table, 0.0).max()
        highest_link = max(arrays.link.max(), arrays.back.max())
        high = max(layers * finite + np.where(np.isfinite(ends), ends, 0.0).max(), highest_link)
        edges += [low, high * 1.001 + 1e-12]
    return Box(*edges)
