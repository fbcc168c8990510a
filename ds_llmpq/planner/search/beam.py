"""Plans where device classes are priced instead of counted: a beam search that counts, guided by the priced costs.

A priced path may use 26 devices of a class of 8. Here partial paths carry their counts. Of those that end at a layer
the most promising ones go on: least cost so far plus the priced cost to go, which is a bound on what follows. Unlike a
rounding along one order of devices this interleaves them freely, so that stages of few bits come to stand on the layers
that bear it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_llmpq.planner.search.shortest_path import CostsToGo, PathStep
from ds_llmpq.planner.search.stage_bounds import NEVER

WIDTH = 400  # partial paths kept at each layer


@dataclass(frozen=True)
class _Ends:
    """Partial paths that end at one layer, N of them. `origin` [N, 2]: the layer where the last stage begins, and the
    row among the paths that end there."""

    cost: np.ndarray  # [N], of the stages and links so far, prices included
    total: np.ndarray  # [N], with the cost to go
    used: np.ndarray  # [N, C]
    last: np.ndarray  # [N] class of the last stage
    origin: np.ndarray

    def take(self, rows: np.ndarray) -> "_Ends":
        return _Ends(self.cost[rows], self.total[rows], self.used[rows], self.last[rows], self.origin[rows])


def search_beam(costs: CostsToGo, counts: Sequence[int], width: int = WIDTH) -> list[PathStep] | None:
    """The best path found that uses no class more often than `counts` [C] allow; None if none was found.

    `costs`: of a path space without counts.
    """
    classes, layers, longest = costs.stage.shape
    usable = costs.stage < NEVER
    reach = np.where(usable.any(axis=1), np.arange(1, longest + 1), 0).max(axis=1)  # [C] most layers of one stage
    limits = np.array(counts)
    start = np.zeros((1, classes), dtype=np.int64)
    waiting: list[list[_Ends]] = [[] for _ in range(layers + 1)]
    waiting[0] = [_Ends(np.zeros(1), np.zeros(1), start, np.full(1, -1), np.zeros((1, 2), dtype=np.int64))]
    kept: list[_Ends | None] = [None] * (layers + 1)
    for layer in range(layers + 1):
        if not waiting[layer]:
            continue
        ends = _merge(waiting[layer], limits)
        ends = ends.take(np.flatnonzero((limits - ends.used) @ reach >= layers - layer))
        ends = kept[layer] = ends.take(np.argsort(ends.total, kind="stable")[:width])
        if layer < layers:
            for c in range(classes):
                _extend(costs, ends, layer, c, limits[c], waiting)
    return _read(kept, layers)


def _merge(parts: list[_Ends], limits: np.ndarray) -> _Ends:
    """All of them, but of equal counts and last class only the cheapest."""
    names = ("cost", "total", "used", "last", "origin")
    ends = _Ends(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    radix = np.cumprod([1, *(limits + 1)])
    key = ends.used @ radix[:-1] + (ends.last + 1) * radix[-1]
    order = np.lexsort((ends.cost, key))
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    return ends.take(order[first])


def _extend(costs: CostsToGo, ends: _Ends, layer: int, c: int, limit: int, waiting: list[list[_Ends]]) -> None:
    """Put every stage of class c that may begin at `layer` behind the paths that end there."""
    rows = np.flatnonzero(ends.used[:, c] < limit)
    if not len(rows):
        return
    used = ends.used[rows]
    used[:, c] += 1
    arrive = ends.cost[rows] + (costs.link[ends.last[rows], c] if layer else 0.0)
    last, origin = np.full(len(rows), c), np.stack([np.full(len(rows), layer), rows], axis=1)
    for length in np.flatnonzero(costs.stage[c, layer] < NEVER) + 1:
        cost = arrive + costs.stage[c, layer, length - 1]
        total = cost + costs.after[layer + length, 0, c]
        fit = total < NEVER
        if fit.any():
            waiting[layer + length].append(_Ends(cost[fit], total[fit], used[fit], last[fit], origin[fit]))


def _read(kept: list[_Ends | None], layers: int) -> list[PathStep] | None:
    """The best path, read off backwards."""
    ends = kept[layers]
    if ends is None or not len(ends.total):
        return None
    steps, last, row = [], layers, int(np.argmin(ends.total))
    while last:
        ends = kept[last]
        first, before = (int(value) for value in ends.origin[row])
        steps.append(PathStep(int(ends.last[row]), first, last))
        last, row = first, before
    return steps[::-1]
