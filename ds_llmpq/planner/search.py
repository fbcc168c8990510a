"""The exact specialised search: branch and bound on the slowest prefill and the slowest decode resource.

For thresholds in a box [p_low, p_high] x [d_low, d_high] the problem separates by stages, and one shortest path covers
all device orders, subsets and interleavings (`paths.py`); stages are bounded by Lagrangian prices (`stages.py`). The
decode round max(m_d * slowest, ring) is bounded by w * m_d * slowest + (1 - w) * ring for any w in [0, 1]; a limit on
quality loss (or on latency) is priced by theta: min latency + theta * (omega - limit) is a bound for every theta.
Boxes of all micro-batch pairs stand in one queue, the most promising first; every path is rounded to a plan.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.classes import Classes, class_links, group
from ds_llmpq.planner.compositions import Compositions
from ds_llmpq.planner.enumeration import Enumeration
from ds_llmpq.planner.feasibility import furthest_layer, pairs
from ds_llmpq.planner.incumbent import Incumbent
from ds_llmpq.planner.objective import Assignment, Prediction, Stage, evaluate
from ds_llmpq.planner.paths import PathSpace, Step
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.prices import best_prices
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.rounding import choose_widths, refine
from ds_llmpq.planner.stages import NEVER, Box, StageBounds

STATE_LIMIT = 3000  # count states times classes beyond which device limits are priced instead of counted
POOL_LIMIT = 90
EXACT_DEPTH = 6  # splits after which long stages on the path are costed exactly
SMALL = 150  # layers x devices x widths, up to which boxes are enumerated on the way
GLANCE_STEPS, STUCK_STEPS = 1_000, 30_000  # of the enumeration: on the way, and when splitting has ended
SHARE_STEPS = 200  # steps of enumeration that an evaluated box permits: about as much time
BATCH_ENTRIES = 40_000
ROUND_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Duals:
    """theta: price of quality loss; w: share of the slowest resource in a decode round; prices: of device classes."""

    theta: float
    w: float
    prices: tuple[float, ...]


@dataclass(frozen=True)
class Node:
    """A box of one micro-batch pair with its proven bound and what its best path looked like."""

    pair: int
    box: Box
    duals: Duals
    bound: float = 0.0
    prediction: Prediction | None = None
    used: tuple[int, ...] = ()
    depth: int = 0
    exact: frozenset[tuple[int, int]] = frozenset()  # (kind, length) of stages to cost exactly
    again: bool = False  # nothing is left to split: settled once more with a thorough search for theta


@dataclass
class Pair:
    """What the search keeps for one micro-batch pair."""

    arrays: PairArrays
    stages: StageBounds
    link: np.ndarray  # [2, C, C]
    back: np.ndarray  # [2, C, C]
    slow: float  # weight of the slowest prefill resource, m_p - 1
    ring: float  # weight of a decode pass
    slowest: float  # weight of the slowest decode resource
    split_round: bool  # the contract's max of the two (else the reference formula adds them)
    root: Box


class Search:
    """Use `run`, then read the incumbent and `bound`."""

    def __init__(
        self,
        problem: Problem,
        best: Incumbent,
        pins: Pins,
        *,
        gap: float,
        deadline: float,
        improve: Callable[[], None] | None = None,
        theta: float | None = None,
    ):
        self.problem, self.best, self.pins, self.gap, self.deadline = problem, best, pins, gap, deadline
        self.mode = problem.objective.mode
        fixed = problem.device_order == "fixed"
        self.classes, self.space, self.priced = _state_space(problem, pins, fixed)
        self.order_links = np.where(np.tri(len(self.classes.members), dtype=bool), np.inf, 0.0) if fixed else 0.0
        self.compositions: Compositions | None = None  # the same for all micro-batch pairs
        self.pairs = [
            self._pair(eta, xi) for eta, xi in pairs(problem) if furthest_layer(problem, eta, xi) == problem.layers
        ]
        self.best.accepts = pins.respected
        self.small = problem.layers * len(problem.devices) * len(problem.bits) <= SMALL
        self.ceiling = max((self._ceiling(pair) for pair in self.pairs), default=math.inf)
        self.open: list[tuple[float, int, Node]] = []
        self.active: list[Node] = []
        self.closed = math.inf  # least bound of what was pruned or could not be split further
        self.ticket = itertools.count()
        self.rooted = False
        self.last_prices: tuple[float, ...] = ()
        self.start_theta, self.last_theta = theta, 0.0
        self.improve, self.improved, self.next_improve = improve, None, 40
        self.evaluated = self.enumerated = 0

    def _pair(self, eta: int, xi: int) -> Pair:
        arrays = pair_arrays(self.problem, eta, xi)
        contract = self.best.formula == "pipeline"
        representatives = self.classes.representatives()
        allowed = self.pins.widths(self.problem)
        if self.compositions is None:
            self.compositions = Compositions(arrays.omega, allowed, NEVER)
        masks = [self.pins.intervals(self.problem, d) for d in representatives]
        stages = StageBounds(arrays, representatives, allowed, masks, self.compositions)
        rounds = arrays.generated_tokens - 1
        link, back = (
            _weighted_links(class_links(table, self.classes), contract) for table in (arrays.link, arrays.back)
        )
        return Pair(
            arrays,
            stages,
            link,
            back,
            slow=arrays.prefill_rounds - 1.0,
            ring=float(rounds) if contract else 1.0,
            slowest=float(rounds * arrays.decode_rounds if contract else rounds * (arrays.decode_rounds - 1)),
            split_round=contract,
            root=_root_box(arrays),
        )

    def _ceiling(self, pair: Pair) -> float:
        """More than the objective of any plan: a bound beyond it proves that a limit cannot be met."""
        worst = float(pair.arrays.omega.max(axis=1).sum()) if pair.arrays.omega.size else 0.0
        if self.mode != "max_latency":
            hops = min(self.problem.layers, len(self.problem.devices))
            box = pair.root
            latency = (2 * hops + pair.slow) * box.p_high + (2 * hops * pair.ring + pair.slowest) * box.d_high
            worst = latency + (self.problem.objective.theta * worst if self.mode == "theta" else 0.0)
        return worst * (1 + 1e-6) + 1e-9

    # -- bounds ---------------------------------------------------------------------------------------------------

    def evaluate(self, nodes: list[Node]) -> list[tuple[float, list[Step]]]:
        """(bound in units of the objective, best path) of each node; the path is empty when nothing is possible."""
        found: list[tuple[float, list[Step]]] = []
        size = max(1, BATCH_ENTRIES // (self.space.states * self.space.classes * self.problem.layers))
        for i in range(0, len(nodes), size):
            found += self._evaluate_batch(nodes[i : i + size])
        self.evaluated += len(nodes)
        return found

    def _evaluate_batch(self, nodes: list[Node]) -> list[tuple[float, list[Step]]]:
        parts = [self.tables(node) for node in nodes]
        longest = max(_longest_stage(stage) for stage, _, _ in parts)
        stage = np.stack([_at_length(stage, longest) for stage, _, _ in parts])
        link, final = (np.stack(tables) for tables in zip(*(rest for _, *rest in parts), strict=True))
        costs = self.space.costs_to_go(stage, link, final)
        results = []
        for x, node in enumerate(nodes):
            value = costs.least(x)
            if math.isinf(value):
                results.append((math.inf, []))
                continue
            value += self.constant(node)
            value -= 1e-9 * abs(value)
            results.append((self.in_objective_units(value, node.duals.theta), costs.path(x)))
        return results

    def constant(self, node: Node) -> float:
        """What every plan in the box costs beside its stages: the low thresholds, less the prices of all devices."""
        pair = self.pairs[node.pair]
        _, slowest = _round_weights(pair, node.duals.w)
        fixed = pair.slow * node.box.p_low + slowest * node.box.d_low
        return fixed - sum(p * count for p, count in zip(node.duals.prices, self.classes.counts, strict=True))

    def ring_weight(self, node: Node) -> float:
        """a_D: the weight of one decode pass."""
        return _round_weights(self.pairs[node.pair], node.duals.w)[0]

    def duals_price(self, node: Node, kind: int) -> float:
        return node.duals.prices[kind]

    def tables(self, node: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stage costs [C, L, K], links [C, C] and what follows the last stage [C] for one node."""
        pair, box, duals = self.pairs[node.pair], node.box, node.duals
        ring, _ = _round_weights(pair, duals.w)
        pair.stages.set_theta(duals.theta)
        stage = pair.stages.bounds(box, ring, node.exact)[self.classes.kind] + np.array(duals.prices)[:, None, None]
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
            return value - theta * limit
        if self.mode == "max_latency":
            return (value - limit) / theta
        return value

    # -- plans ----------------------------------------------------------------------------------------------------

    def plan(self, node: Node, path: list[Step]) -> Prediction | None:
        """Round the path to a plan, offer it, and feed the multiplier pools."""
        pair, duals = self.pairs[node.pair], node.duals
        if self.priced:
            path = self._within_counts(node, path)
        ring, _ = _round_weights(pair, duals.w)
        pair.stages.set_theta(duals.theta)
        widths = []
        for step in path:
            q = self.classes.kind[step.kind]
            place = (pair.stages, q, step.first, step.last, node.box, ring)
            chosen, cost = choose_widths(*place)
            if step.last - step.first > pair.stages.compositions.short and len(pair.stages.pools[q]) < POOL_LIMIT:
                refine(*place, cost)
            widths.append(chosen)
        if any(chosen is None for chosen in widths):
            return None
        devices = self._devices(pair, path)
        if devices is None:
            return None
        stages = tuple(
            Stage(self.problem.devices[d].name, s.first, s.last, tuple(self.problem.bits[b] for b in chosen))
            for d, s, chosen in zip(devices, path, widths, strict=True)
        )
        assignment = Assignment(stages, pair.arrays.prefill_micro_batch, pair.arrays.decode_micro_batch)
        self.best.offer(assignment)
        return evaluate(self.problem, assignment, self.best.formula)

    def _within_counts(self, node: Node, path: list[Step]) -> list[Step]:
        """Where devices are priced, a path may use too many: place all devices in a row, class by class in the order
        of the path, and take the best path along it."""
        seen = [[step.first for step in path if step.kind == c] for c in range(self.space.classes)]
        if all(len(steps) <= count for steps, count in zip(seen, self.classes.counts, strict=True)):
            return path
        middle = [np.mean(steps) if steps else self.problem.layers / 2 for steps in seen]
        row = [c for c in np.argsort(middle, kind="stable") for _ in range(self.classes.counts[c])]
        stage, link, final = self.tables(node)
        stage = _at_length(stage, _longest_stage(stage)) - np.array(node.duals.prices)[:, None, None]
        forward = np.where(np.tri(len(row), dtype=bool), np.inf, 0.0)
        costs = PathSpace(len(row), None).costs_to_go(
            stage[row][None], (link[np.ix_(row, row)] + forward)[None], final[row][None]
        )
        if math.isinf(costs.least(0)):
            return path
        return [replace(step, kind=int(row[step.kind])) for step in costs.path(0)]

    def _devices(self, pair: Pair, path: list[Step]) -> list[int] | None:
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

    # -- branch and bound -----------------------------------------------------------------------------------------

    @property
    def target(self) -> float:
        """What has at least this bound need not be looked at; without a plan, what no plan can reach."""
        if math.isfinite(self.best.value):
            return self.best.value - self.gap * abs(self.best.value)
        return self.ceiling

    @property
    def bound(self) -> float:
        if not self.rooted:
            return 0.0
        pending = [self.closed, *(entry[0] for entry in self.open[:1]), *(node.bound for node in self.active)]
        return max(0.0, min(pending))

    def run(self) -> None:
        """Until the gap is closed, the deadline passes, or nothing can be split further."""
        prices = (0.0,) * len(self.classes.members)
        self.active = [
            Node(i, pair.root, Duals(self._first_theta(pair), 0.5, prices)) for i, pair in enumerate(self.pairs)
        ]
        self.rooted = True
        for i, root in enumerate(list(self.active)):
            if time.monotonic() > self.deadline:
                break
            # Later pairs begin with the multipliers that the earlier ones have found.
            theta = self.last_theta if i and self.mode != "theta" else root.duals.theta
            start = replace(root, duals=replace(root.duals, theta=theta, prices=self.last_prices or prices))
            self.active[self.active.index(root)] = start
            rounds = 3 if self.priced else 8
            seek = i == 0 and self.mode != "theta" and self.start_theta is None
            self._settle(start, 16 if seek else rounds, factor=4.0 if seek else 1.2)
        while self.open and not self.active and time.monotonic() < self.deadline and not self.done():
            self._step()
            self.best.raise_bound(self.bound)
            self._improve()
        self.best.raise_bound(self.bound)

    def done(self) -> bool:
        return self.best.value <= self.bound or self.best.gap <= self.gap

    def _improve(self) -> None:
        """Hand a new incumbent to the polish, at growing intervals."""
        if self.improve is None or self.best.assignment is self.improved or self.evaluated < self.next_improve:
            return
        if not self.done():
            self.improve()
            self.improved, self.next_improve = self.best.assignment, 2 * self.evaluated

    def _step(self) -> None:
        """Split the most promising box and bound the halves."""
        node = self.open[0][2]
        self.active.append(node)
        heapq.heappop(self.open)
        if node.bound >= self.target:
            self._close(node)
            return
        halves = self._halves(node)
        self.active += halves
        self.active.remove(node)
        for half in halves:
            if half.again:
                self._settle(half, rounds=14, factor=3.0)
            else:
                self._settle(half, rounds=2, factor=1 + 1 / (3 + half.depth))

    def _close(self, node: Node) -> None:
        self.closed = min(self.closed, node.bound)
        self.active.remove(node)

    def _settle(self, node: Node, rounds: int, factor: float) -> None:
        """Evaluate a node, improving its duals for a few rounds; then queue or close it."""
        best, duals, bracket, reached = node, node.duals, [0.0, math.inf], -math.inf
        for _ in range(rounds):
            tried = replace(node, duals=duals, exact=best.exact)
            if self.priced:
                tried = self._ascend(tried, 30 if node.depth == 0 else 15)
            ((bound, path),) = self.evaluate([tried])
            if not path or bound >= self.target:
                best = replace(best, bound=max(best.bound, bound))
                break
            prediction = self.plan(tried, path)
            used = tuple(sum(step.kind == c for step in path) for c in range(self.space.classes))
            tried = replace(tried, bound=max(bound, best.bound), prediction=prediction, used=used)
            best = tried if bound > reached or best.prediction is None else replace(best, bound=tried.bound)
            theta = self._next_theta(tried, bound, bracket, factor)
            duals, reached = replace(self._next_duals(tried), theta=theta), max(reached, bound)
            best = replace(best, exact=node.exact | self._inexact(tried, path))
        self.last_theta, self.last_prices = best.duals.theta, best.duals.prices
        # First keep the bound, then forget the node: an interruption in between loses nothing.
        if best.bound >= self.target or math.isinf(best.bound):
            self.closed = min(self.closed, best.bound)
        else:
            heapq.heappush(self.open, (best.bound, next(self.ticket), best))
        self.active.remove(node)

    def _inexact(self, node: Node, path: list[Step]) -> frozenset[tuple[int, int]]:
        """Lengths around the path's longer stages, once the box is narrow enough for their Lagrangian gap to matter."""
        compositions = self.pairs[node.pair].stages.compositions
        if node.depth < EXACT_DEPTH or not math.isfinite(self.best.value):
            return frozenset()
        near = {(self.classes.kind[step.kind], step.last - step.first + shift) for step in path for shift in (-1, 0, 1)}
        most = min(compositions.long, self.pairs[node.pair].stages.longest)
        return frozenset((q, k) for q, k in near if compositions.short < k <= most)

    def _next_duals(self, node: Node) -> Duals:
        """Move w towards the side that binds, theta towards the limit, prices with the overuse."""
        pair, duals, seen = self.pairs[node.pair], node.duals, node.prediction
        w, theta = duals.w, duals.theta
        if seen is not None and pair.split_round:
            ring = sum(seen.stage_decode_seconds) + sum(seen.link_decode_seconds)
            slowest = max(*seen.stage_decode_seconds, *seen.link_decode_seconds)
            near = min(range(len(ROUND_STEPS)), key=lambda i: abs(ROUND_STEPS[i] - w))
            move = -1 if ring > pair.arrays.decode_rounds * slowest else 1
            w = ROUND_STEPS[min(max(near + move, 0), len(ROUND_STEPS) - 1)]
        return Duals(theta, w, duals.prices)

    def _next_theta(self, node: Node, bound: float, bracket: list[float], factor: float) -> float:
        """Bisection (or a step by `factor` while one side is open) towards the price at which the limit is just met.

        What decides is the priced path itself (a subgradient), not the plan rounded from it: in a wide box the plan is
        much slower than the path.
        """
        seen, theta = node.prediction, node.duals.theta
        if seen is None or self.mode == "theta" or self.start_theta is not None:
            return theta
        limit = self.problem.objective.limit
        if self.mode == "max_quality_loss":
            cheap = seen.quality_loss > limit
        else:
            cheap = theta * (bound - seen.quality_loss) <= 0  # the path's latency is limit + theta * (bound - omega)
        bracket[0 if cheap else 1] = theta
        low, high = bracket
        if low > 0 and math.isfinite(high):
            return math.sqrt(low * high)
        return theta * factor if cheap else theta / factor

    def _ascend(self, node: Node, rounds: int) -> Node:
        """The node with better prices of device classes; its other duals stay."""
        bare = replace(node, duals=replace(node.duals, prices=(0.0,) * self.space.classes))
        stage, link, final = self.tables(bare)
        stage = _at_length(stage, _longest_stage(stage))
        counts, constant = np.array(self.classes.counts), self.constant(bare)

        def value_and_slope(prices: np.ndarray) -> tuple[float, np.ndarray | None]:
            costs = self.space.costs_to_go((stage + prices[:, None, None])[None], link[None], final[None])
            value = costs.least(0) + constant - float(prices @ counts)
            if math.isinf(value):
                return value, None
            return value, np.bincount([step.kind for step in costs.path(0)], minlength=len(counts)) - counts

        goal = self._goal(node)
        reference = goal if math.isfinite(goal) else abs(constant)
        prices = best_prices(
            value_and_slope, np.array(node.duals.prices), rounds=rounds, goal=goal, tolerance=1e-3 * reference
        )
        return replace(node, duals=replace(node.duals, prices=tuple(prices.tolist())))

    def _goal(self, node: Node) -> float:
        """The target in the units of a priced path, with a little to spare."""
        value, limit = self.target + 1e-6 * abs(self.target), self.problem.objective.limit
        if self.mode == "max_latency":
            return limit + node.duals.theta * value
        return value + (node.duals.theta * limit if self.mode == "max_quality_loss" else 0.0)

    def _halves(self, node: Node) -> list[Node]:
        """Split the threshold whose interval explains most of the difference between plan and bound."""
        box = self._clip(node)
        if box.p_low > box.p_high or box.d_low > box.d_high:
            self.closed = min(self.closed, max(node.bound, self.target))
            return []
        p_top, d_top = self._tops(node, box)
        if self._negligible(node, box, p_top, d_top):
            if self._exhaust(node, STUCK_STEPS):
                return []
            p_top, d_top = box.p_high, box.d_high
            if self._negligible(node, box, p_top, d_top):
                if self.mode != "theta" and self.start_theta is None and not node.again:
                    return [replace(node, again=True, prediction=None)]  # only a better price can help
                self.closed = min(self.closed, node.bound)
                return []
        elif self.small and node.depth % 4 == 2 and self._exhaust(node, GLANCE_STEPS):
            return []
        child = replace(node, depth=node.depth + 1, prediction=None, again=False)
        p_gap, d_gap = self._gaps(node, box, p_top, d_top)
        if p_gap >= d_gap:
            middle = _middle(box.p_low, p_top)
            return [replace(child, box=replace(box, p_high=middle)), replace(child, box=replace(box, p_low=middle))]
        middle = _middle(box.d_low, d_top)
        return [replace(child, box=replace(box, d_high=middle)), replace(child, box=replace(box, d_low=middle))]

    def _tops(self, node: Node, box: Box) -> tuple[float, float]:
        """The slowest resources of the node's plan, at most the box's: above them the box need not be split."""
        seen = node.prediction
        if seen is None:
            return box.p_high, box.d_high
        return (
            min(box.p_high, max(*seen.stage_prefill_seconds, *seen.link_prefill_seconds)),
            min(box.d_high, max(*seen.stage_decode_seconds, *seen.link_decode_seconds)),
        )

    def _gaps(self, node: Node, box: Box, p_top: float, d_top: float) -> tuple[float, float]:
        """What the thresholds' uncertainty contributes to the difference between plan and bound."""
        pair = self.pairs[node.pair]
        p_gap = pair.slow * max(p_top - box.p_low, 0.0)
        return p_gap, pair.slowest * max(node.duals.w, 0.3) * max(d_top - box.d_low, 0.0)

    def _negligible(self, node: Node, box: Box, p_top: float, d_top: float) -> bool:
        reference = abs(self.best.value if math.isfinite(self.best.value) else node.bound)
        return max(self._gaps(node, box, p_top, d_top)) <= 1e-7 * reference

    def _exhaust(self, node: Node, steps: int) -> bool:
        """Enumerate what is left of a box; false when that is too much, or more than its share of the work so far."""
        if not self.classes.exact or self.priced or self.enumerated > SHARE_STEPS * (self.evaluated + 100):
            return False
        enumeration = Enumeration(self, node, steps)
        done = enumeration.run()
        self.enumerated += steps - max(enumeration.steps, 0)
        if done:
            self.closed = min(self.closed, max(node.bound, self.target))
        return done

    def _clip(self, node: Node) -> Box:
        """Thresholds so high that the bound would pass the target can go."""
        if not math.isfinite(self.best.value):
            return node.box
        pair, box = self.pairs[node.pair], node.box
        room = (self.target - node.bound) * (node.duals.theta if self.mode == "max_latency" else 1.0)
        p_high, d_high = box.p_high, box.d_high
        if pair.slow > 0:
            p_high = min(p_high, box.p_low + room / pair.slow)
        _, slowest = _round_weights(pair, node.duals.w)
        if slowest > 0:
            d_high = min(d_high, box.d_low + room / slowest)
        if p_high < box.p_high or d_high < box.d_high:
            self.closed = min(self.closed, self.target)
        return Box(box.p_low, p_high, box.d_low, d_high)

    def _first_theta(self, pair: Pair) -> float:
        if self.mode == "theta":
            return self.problem.objective.theta
        if self.start_theta is not None:
            return self.start_theta
        return plausible_theta(pair, self.problem.objective.limit if self.mode == "max_latency" else 0.0)


def plausible_theta(pair: Pair, seconds: float = 0.0) -> float:
    """A price at which the whole range of quality losses is worth about the least latency (or `seconds`, if more)."""
    omega = pair.arrays.omega
    spread = float((omega.max(axis=1) - omega.min(axis=1)).sum())
    least = (pair.slow + 1) * pair.root.p_low + max(pair.slowest, pair.ring) * pair.root.d_low
    return max(least, seconds, 1e-9) / max(spread, 1e-9)


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


def _round_weights(pair: Pair, w: float) -> tuple[float, float]:
    """Weights of (ring, slowest decode resource) under the share w."""
    return ((1 - w) * pair.ring, w * pair.slowest) if pair.split_round else (pair.ring, pair.slowest)


def _weighted_links(table: np.ndarray, counted: bool) -> np.ndarray:
    """Link times (none in the reference formula); a class without a second member cannot follow itself."""
    return np.where(np.isfinite(table), table if counted else 0.0, NEVER)


def _longest_stage(stage: np.ndarray) -> int:
    """The greatest length with a finite cost."""
    finite = np.flatnonzero(np.isfinite(stage).any(axis=(0, 1)))
    return int(finite[-1]) + 1 if len(finite) else 1


def _at_length(stage: np.ndarray, longest: int) -> np.ndarray:
    """[C, L, longest]: cut, or filled with infinity."""
    kept = stage[..., :longest]
    return np.pad(kept, ((0, 0), (0, 0), (0, longest - kept.shape[2])), constant_values=np.inf)


def _root_box(arrays: PairArrays) -> Box:
    """Thresholds between perfect balance over all devices at their fastest width, and everything on the slowest."""
    layers = len(arrays.omega)
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


def _middle(low: float, high: float) -> float:
    """Halfway, geometrically where the interval spans more than a factor of four."""
    return math.sqrt(low * high) if low > 0 and high > 4 * low else (low + high) / 2
