"""PipeEdge, a baseline: one bit width, and the cut, subset and order of devices whose slowest stage or link is fastest.

As in its paper, a dynamic program over layers, devices used and the last device. Here it is asked, threshold by
threshold, how far the devices reach within it: the further, the better, so one number a state is enough.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.feasibility import STATE_LIMIT, count_states, list_reaches, pairs, states_by_total
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.search.device_classes import Classes, class_links, group

Path = list[tuple[int, int, int]]  # (device, first, last) of each stage
STEPS = 20  # of the bisection: one part in a million


def pipeedge(problem: Problem) -> Iterable[Assignment]:
    """For each micro-batch pair, at the highest bit width at which one fits. What counts of a stage or link is its
    work on the whole batch: all micro-batches of prefill and of all decode rounds."""
    classes = group(problem, {}, merge=False)
    if count_states(classes.counts) > STATE_LIMIT:
        classes = group(problem, {}, merge=True)
    for bits in sorted(problem.bits, reverse=True):
        found = [cut for pair in pairs(problem) if (cut := _min_max(problem, classes, bits, *pair)) is not None]
        if found:
            yield from found
            return


def _min_max(problem: Problem, classes: Classes, bits: int, *pair: int) -> Assignment | None:
    """Bisection on the slowest stage or link."""
    arrays = pair_arrays(problem, *pair)
    work = _Work.of(problem, classes, arrays, problem.bits.index(bits))
    usable = np.isfinite(work.per_layer)
    if not usable.any():
        return None
    ends = sum(float(part[np.isfinite(part)].sum()) for part in (work.embed, work.head))
    high = max(problem.layers * float(work.per_layer[usable].max()) + ends, float(work.links.max()))
    low, best = 0.0, _cover(problem, classes, work, high)
    if best is None:
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        path = _cover(problem, classes, work, middle)
        low, high, best = (low, middle, path) if path is not None else (middle, high, best)
    stages = tuple(StageAssignment(problem.devices[d].name, a, b, (bits,) * (b - a)) for d, a, b in best)
    return Assignment(stages, *pair)


@dataclass(frozen=True)
class _Work:
    """Seconds on the whole batch at one bit width. `held[d][a]`: how far memory lets device d go from layer a on."""

    per_layer: np.ndarray  # [D]
    embed: np.ndarray  # [D]
    head: np.ndarray  # [D]
    links: np.ndarray  # [D, D]
    class_links: np.ndarray  # [C, C]
    held: list[np.ndarray]

    @classmethod
    def of(cls, problem: Problem, classes: Classes, arrays: PairArrays, column: int) -> "_Work":
        rounds = np.array([arrays.prefill_rounds, (arrays.generated_tokens - 1) * arrays.decode_rounds], dtype=float)

        def total(prefill: np.ndarray, decode: np.ndarray) -> np.ndarray:
            available = np.isfinite(prefill) & np.isfinite(decode)
            return np.where(available, rounds[0] * prefill + rounds[1] * np.where(available, decode, 0.0), np.inf)

        least = np.where(arrays.available[:, column, None], arrays.layer_bytes[:, column], np.inf)
        links = total(*arrays.link)
        np.fill_diagonal(links, 0.0)
        return cls(
            total(arrays.prefill[:, column], arrays.decode[:, column]),
            total(*arrays.embed),
            total(*arrays.head),
            links,
            class_links(links, classes),
            list_reaches(problem, arrays, least),
        )

    def within(self, d: int, threshold: float) -> np.ndarray:
        """The reach of device d cut to what the threshold allows."""
        reach = self.held[d]
        layers = len(reach) - 1
        first = np.arange(layers + 1)
        if not np.isfinite(self.per_layer[d]):
            return first
        room = threshold - np.where(first == 0, self.embed[d], 0.0)
        most = room / self.per_layer[d] if self.per_layer[d] else np.full(layers + 1, layers)
        counts = np.where(room >= 0, np.minimum(most, layers), 0).astype(int)
        cut = np.minimum(reach, first + counts)
        too_long = (cut == layers) & (room < (layers - first) * self.per_layer[d] + self.head[d])
        return np.maximum(np.where(too_long, np.minimum(cut, layers - 1), cut), first)


def _cover(problem: Problem, classes: Classes, work: _Work, threshold: float) -> Path | None:
    """Stages and links, none slower than the threshold, that hold all layers."""
    reach = np.array([work.within(devices[0], threshold) for devices in classes.members])
    if problem.device_order == "free" and count_states(classes.counts) <= STATE_LIMIT:
        return _any_order(classes, reach, work.class_links <= threshold)
    own = {d: c for c, devices in enumerate(classes.members) for d in devices}
    near = work.links <= threshold
    for order in _orders(problem, classes):
        if (path := _in_order(order, [reach[own[d]] for d in order], near)) is not None:
            return path
    return None


def _orders(problem: Problem, classes: Classes) -> Iterator[list[int]]:
    """The fixed order; beyond the state limit, the classes one after the other, beginning with each of them."""
    if problem.device_order == "fixed":
        yield list(range(len(problem.devices)))
        return
    for turn in range(len(classes.members)):
        yield [d for devices in classes.members[turn:] + classes.members[:turn] for d in devices]


def _in_order(order: list[int], reaches: list[np.ndarray], near: np.ndarray) -> Path | None:
    """furthest[j]: how far stages reach of which device order[j] holds the last. Where every link is fast enough, each
    device simply takes what it can."""
    layers, path = len(reaches[0]) - 1, []
    if near.all():
        layer = 0
        for d, reach in zip(order, reaches, strict=True):
            if reach[layer] > layer:
                path.append((d, layer, int(reach[layer])))
                layer = path[-1][2]
        return path if layer == layers else None
    furthest, before = np.zeros(len(order), dtype=int), np.full(len(order), -1)
    for j, d in enumerate(order):
        starts = [(furthest[i] * near[order[i], d], i) for i in range(j)]
        start, before[j] = max(starts, default=(0, -1))
        if not start:
            before[j] = -1
        furthest[j] = reaches[j][start] if reaches[j][start] > start else 0
        if furthest[j] == layers:
            while j >= 0:
                path.append((order[j], int(furthest[before[j]]) if before[j] >= 0 else 0, int(furthest[j])))
                j = int(before[j])
            return path[::-1]
    return None


def _any_order(classes: Classes, reach: np.ndarray, near: np.ndarray) -> Path | None:
    """Exact. furthest[s, c]: how far the devices of state s reach, the last of class c; 0 if they cannot be joined."""
    kinds, layers = len(reach), reach.shape[1] - 1
    before, levels = states_by_total(tuple(classes.counts))
    furthest, columns, joined = np.zeros((len(before), kinds), dtype=np.int64), np.arange(kinds), near.all()
    best = np.zeros(len(before), dtype=np.int64)  # over the last class: enough where any can follow any
    for level, states in enumerate(levels):
        earlier = before[states]  # [n, C]
        start = best[earlier] if joined else (furthest[earlier] * near.T).max(axis=2)
        reached = reach[columns, start]
        possible = (earlier >= 0) & ((start > 0) | (level == 0)) & (reached > start)
        furthest[states] = np.where(possible, reached, 0)
        best[states] = furthest[states].max(axis=1)
        done = states[best[states] == layers]
        if len(done):
            return _trace(classes, before, furthest, near, int(done[0]))
    return None


def _trace(classes: Classes, before: np.ndarray, furthest: np.ndarray, near: np.ndarray, state: int) -> Path:
    path: Path = []
    used = np.array(np.unravel_index(state, [count + 1 for count in classes.counts]))
    c, last = int(furthest[state].argmax()), int(furthest[state].max())
    while last:
        used[c] -= 1
        device, state = classes.members[c][used[c]], int(before[state, c])
        joinable = furthest[state] * near[:, c]
        first, c = int(joinable.max()), int(joinable.argmax())
        path.append((device, first, last))
        last = first
    return path[::-1]
