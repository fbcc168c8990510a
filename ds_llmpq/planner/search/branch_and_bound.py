"""The exact specialised search: branch and bound on the slowest prefill and the slowest decode resource.

Boxes of thresholds (`relaxation.py` bounds them) of all micro-batch pairs stand in one queue, the most promising first.
The most promising one is split, its halves are bounded under better duals, and every path on the way is rounded to a
plan. Where splitting no longer helps, what is left of a box is enumerated (`enumeration.py`).
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

from ds_llmpq.planner.incumbent import Incumbent, sufficient_bound
from ds_llmpq.planner.objective import Prediction, evaluate
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.search.enumeration import Enumeration
from ds_llmpq.planner.search.fractional import Fractional, Fractionals, first_bounds
from ds_llmpq.planner.search.node import Duals, Guess, Node, Pair, Target
from ds_llmpq.planner.search.relaxation import Relaxation
from ds_llmpq.planner.search.shortest_path import PathStep
from ds_llmpq.planner.search.splitting import cut_above, find_tops, halve, weigh_gaps
from ds_llmpq.planner.search.stage_bounds import Box

EXACT_DEPTH = 6  # splits after which long stages on the path are costed exactly
SMALL = 150  # layers x devices x bit widths, up to which boxes are enumerated on the way
GLANCE_STEPS, STUCK_STEPS = 1_000, 30_000  # of the enumeration: on the way, and when splitting has ended
SHARE_STEPS = 200  # steps of enumeration that an evaluated box permits: about as much time
COUNT_FACTOR = 1.2  # of boxes evaluated, from one beam search to the next
# After so many boxes in which the bound does not rise by that share of what is missing, a fixed theta is given up.
# Halves then get (rounds, factor) to find their own.
IDLE, RISE, FREED = 40, 0.02, (3, 2.0)
ROUND_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


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
        first: Fractionals | None = None,
    ):
        """`first`: what is known of the micro-batch pairs already; None finds it out."""
        self.problem, self.best, self.gap, self.deadline = problem, best, gap, deadline
        self.mode = problem.objective.mode
        self.first = first_bounds(problem, pins, deadline) if first is None else first
        worth = sufficient_bound(best.value, gap)
        chosen = [pair for pair, known in self.first.items() if known.bound < worth]
        self.relaxed = Relaxation(problem, pins, chosen, deadline)
        self.pairs, self.classes, self.priced = self.relaxed.pairs, self.relaxed.classes, self.relaxed.priced
        self.goal = Target(best, gap, self.relaxed.ceiling())
        self.small = is_small(problem)
        self.active: list[Node] = []
        # The least bound of what was pruned or could not be split further.
        self.closed = min((known.bound for known in self.first.values() if known.bound >= worth), default=math.inf)
        self.ticket = itertools.count()
        self.last_prices: tuple[float, ...] = (0.0,) * len(self.classes.members)
        self.start_theta, self.last_theta = theta, 0.0
        self.open = [(node.bound, next(self.ticket), node) for node in map(self._root, range(len(self.pairs)))]
        heapq.heapify(self.open)
        self.improve, self.improved, self.next_improve = improve, None, 40
        self.next_count = 0.0
        self.enumerated, self.vain = 0, 0  # steps in all, and enumerations in a row that were given up
        self.theta_is_fixed, self.risen, self.risen_at = theta is not None, 0.0, 0

    @property
    def target(self) -> float:
        """What has at least this bound need not be looked at."""
        return self.goal.value

    def roots(self, most: int) -> list[tuple[Node, Fractional]]:
        """The most promising boxes in the queue, each with what the first bounds say of its pair."""
        return [(node, self.known(node.pair)) for _, _, node in sorted(self.open)[:most]]

    @property
    def bound(self) -> float:
        pending = [self.closed, *(entry[0] for entry in self.open[:1]), *(node.bound for node in self.active)]
        return max(0.0, min(pending))

    def run(self) -> None:
        """Until the gap is closed, the deadline passes, or nothing can be split further."""
        while self.open and not self.active and time.monotonic() < self.deadline and not self.done():
            self._step()
            self.best.raise_bound(self.bound)
            self._free_theta()
            self._count_devices()
            self._improve()
        self.best.raise_bound(self.bound)

    def _free_theta(self) -> None:
        """One theta for all boxes is quick where it suits them; where the bound stands still, each seeks its own."""
        if self.bound > self.risen + RISE * (self.target - self.risen):
            self.risen, self.risen_at = self.bound, self.relaxed.evaluated
        elif self.relaxed.evaluated > self.risen_at + IDLE:
            self.theta_is_fixed = False

    def _count_devices(self) -> None:
        """Where devices are priced, search the most promising box for plans that keep their numbers, at growing
        intervals."""
        if not self.priced or not self.open or self.relaxed.evaluated < self.next_count or self.done():
            return
        node = self.open[0][2]
        if node.settled and (assignment := self.relaxed.search_counted(node)) is not None:
            self.best.offer(assignment)
        self.next_count = COUNT_FACTOR * self.relaxed.evaluated

    def done(self) -> bool:
        return self.goal.met_by(self.bound)

    def _improve(self) -> None:
        """Hand a new incumbent to the polish, at growing intervals."""
        if self.improve is None or self.best.assignment is self.improved or self.relaxed.evaluated < self.next_improve:
            return
        if not self.done():
            self.improve()
            self.improved, self.next_improve = self.best.assignment, 2 * self.relaxed.evaluated

    def _step(self) -> None:
        """Split the most promising box and bound the halves."""
        node = self.open[0][2]
        self.active.append(node)
        heapq.heappop(self.open)
        if node.bound >= self.target:
            self._close(node)
            return
        if not node.settled:
            self._settle_root(node)
            return
        halves = self._halves(node)
        self.active += halves
        self.active.remove(node)
        for half in halves:
            if half.again:
                self._settle(half, rounds=14, factor=3.0)
            else:
                rounds, factor = (2, 1 + 1 / (3 + half.depth)) if self.start_theta is None else FREED
                self._settle(half, rounds=2 if self.theta_is_fixed else rounds, factor=factor)

    def _settle_root(self, node: Node) -> None:
        """Whole pairs get more rounds than halves do; each begins with the prices that the ones before have found."""
        theta = node.duals.theta
        known = self.knows_theta(node.pair)
        if not known and self.last_theta:
            theta = self.last_theta
        start = replace(node, duals=Duals(theta, node.duals.w, self.last_prices))
        self.active[self.active.index(node)] = start
        seek = not known and not self.last_theta
        self._settle(start, 16 if seek else 3 if self.priced else 8, factor=4.0 if seek else 1.2)

    def _close(self, node: Node) -> None:
        self.closed = min(self.closed, node.bound)
        self.active.remove(node)

    def _settle(self, node: Node, rounds: int, factor: float) -> None:
        """Evaluate a node, improving its duals for a few rounds; then queue or close it."""
        best, duals, bracket, reached = replace(node, settled=True), node.duals, [0.0, math.inf], -math.inf
        for _ in range(rounds):
            if time.monotonic() > self.deadline:
                break
            tried = replace(node, duals=duals, exact=best.exact, settled=True)
            if self.priced:
                tried = self.relaxed.with_better_prices(tried, 30 if node.depth == 0 else 15, self._goal(tried))
            bound, path = self.relaxed.evaluate(tried)
            if not path or bound >= self.target:
                best = replace(best, bound=max(best.bound, bound))
                break
            prediction = self._plan(tried, path)
            used = tuple(sum(step.kind == c for step in path) for c in range(self.relaxed.space.classes))
            tried = replace(tried, bound=max(bound, best.bound), own=bound, prediction=prediction, used=used)
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

    def _plan(self, node: Node, path: list[PathStep]) -> Prediction | None:
        """Round the path to a plan and offer it."""
        assignment = self.relaxed.round_path(node, path)
        if assignment is None:
            return None
        self.best.offer(assignment)
        return evaluate(self.problem, assignment)

    def _inexact(self, node: Node, path: list[PathStep]) -> frozenset[tuple[int, int]]:
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
        if seen is not None:
            near = min(range(len(ROUND_STEPS)), key=lambda i: abs(ROUND_STEPS[i] - w))
            move = -1 if seen.ring_binds(pair.arrays.decode_rounds) else 1
            w = ROUND_STEPS[min(max(near + move, 0), len(ROUND_STEPS) - 1)]
        return Duals(theta, w, duals.prices)

    def _next_theta(self, node: Node, bound: float, bracket: list[float], factor: float) -> float:
        """Bisection (or a step by `factor` while one side is open) towards the price at which the limit is just met.

        What decides is the priced path itself (a subgradient), not the plan rounded from it: in a wide box the plan is
        much slower than the path.
        """
        seen, theta = node.prediction, node.duals.theta
        if seen is None or self.mode == "theta" or self.theta_is_fixed:
            return theta
        limit = self.problem.objective.limit
        if self.mode == "max_quality_loss":
            cheap = seen.quality_loss > limit
        else:
            cheap = theta * (bound - seen.quality_loss) <= 0  # the path's latency is limit + theta * (bound - loss)
        bracket[0 if cheap else 1] = theta
        low, high = bracket
        if low > 0 and math.isfinite(high):
            return math.sqrt(low * high)
        return max(theta * factor if cheap else theta / factor, self.problem.objective.theta)

    def _goal(self, node: Node) -> float:
        """The target in the units of a priced path, with a little to spare."""
        value, limit = self.target + 1e-6 * abs(self.target), self.problem.objective.limit
        if self.mode == "max_latency":
            return limit + node.duals.theta * value
        own = self.problem.objective.theta
        return value + ((node.duals.theta - own) * limit if self.mode == "max_quality_loss" else 0.0)

    def _halves(self, node: Node) -> list[Node]:
        """Split the threshold whose interval explains most of the difference between plan and bound."""
        box = self._clip(node)
        if box.p_low > box.p_high or box.d_low > box.d_high:
            self.closed = min(self.closed, max(node.bound, self.target))
            return []
        p_top, d_top = find_tops(node, box)
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
        return halve(self.pairs[node.pair], node, box, p_top, d_top)

    def _negligible(self, node: Node, box: Box, p_top: float, d_top: float) -> bool:
        reference = abs(self.best.value if math.isfinite(self.best.value) else node.bound)
        return max(weigh_gaps(self.pairs[node.pair], node, box, p_top, d_top)) <= 1e-7 * reference

    def _exhaust(self, node: Node, steps: int) -> bool:
        """Enumerate what is left of a box; false when that is too much, or more than its share of the work so far."""
        share = SHARE_STEPS * (self.relaxed.evaluated + 100) / (1 if self.small else 1 + self.vain)
        if not self.classes.exact or self.priced or self.enumerated > share:
            return False
        enumeration = Enumeration(self.relaxed, node, self.goal, self.deadline, steps)
        done = enumeration.run()
        self.enumerated += steps - max(enumeration.steps, 0)
        self.vain = 0 if done else self.vain + 1
        if done:
            self.closed = min(self.closed, max(node.bound, self.target))
        return done

    def _clip(self, node: Node) -> Box:
        """Thresholds so high that the bound would pass the target can go."""
        if not math.isfinite(self.best.value) or not math.isfinite(node.own):
            return node.box
        room = (self.target - node.own) * (node.duals.theta if self.mode == "max_latency" else 1.0)
        box = cut_above(self.pairs[node.pair], node, room)
        if box != node.box:
            self.closed = min(self.closed, self.target)
        return box

    def _root(self, i: int) -> Node:
        """The whole of a pair, with what the first bounds say of it."""
        known = self.known(i)
        share = 0.5 if known.share is None else known.share
        return Node(i, self.pairs[i].root, Duals(self._first_theta(i), share, self.last_prices), known.bound)

    def guess_theta(self) -> Guess | None:
        """What a search for the price of the limit begins with; None where there is no limit, or no pair to look at."""
        if self.mode == "theta" or not self.open:
            return None
        root = self.open[0][2]
        return Guess(root.duals.theta, near=self.knows_theta(root.pair))

    def known(self, pair: int) -> Fractional:
        arrays = self.pairs[pair].arrays
        return self.first[arrays.prefill_micro_batch, arrays.decode_micro_batch]

    def knows_theta(self, pair: int) -> bool:
        """The price of quality loss of a pair is given, or at least that of its fractional optimum."""
        return self.mode == "theta" or bool(self.start_theta) or bool(self.known(pair).theta)

    def _first_theta(self, pair: int) -> float:
        """The price of quality loss to begin with."""
        if self.mode == "theta":
            return self.problem.objective.theta
        seconds = self.problem.objective.limit if self.mode == "max_latency" else 0.0
        theta = self.start_theta or self.known(pair).theta or plausible_theta(self.pairs[pair], seconds)
        return max(theta, self.problem.objective.theta)


def is_small(problem: Problem) -> bool:
    """Whether boxes are enumerated on the way: such a problem needs no good prices."""
    return problem.layers * len(problem.devices) * len(problem.bits) <= SMALL


def plausible_theta(pair: Pair, seconds: float = 0.0) -> float:
    """A price at which the whole range of quality losses is worth about the least latency (or `seconds`, if more)."""
    loss = pair.arrays.sensitivity
    spread = float((loss.max(axis=1) - loss.min(axis=1)).sum())
    least = (pair.slow + 1) * pair.root.p_low + max(pair.slowest, pair.ring) * pair.root.d_low
    return max(least, seconds, 1e-9) / max(spread, 1e-9)
