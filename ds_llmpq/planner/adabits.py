"""adabits, the baseline of LLM-PQ: the cut and the bit widths of least quality loss that the memory allows.

Speed plays no part. Devices keep the listed order; any may be left out. The optimum is exact: a dynamic program over
layers and devices keeps, for the stage under way, every undominated pair of bytes and loss.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.feasibility import pairs
from ds_llmpq.planner.objective import charge_head
from ds_llmpq.planner.problem import Problem

Cut = list[tuple[int, int, list[int]]]  # (device, first layer, bit index of each layer)


@dataclass(frozen=True)
class _Front:
    """Undominated choices of bit widths up to some layer: bytes of the stage under way, loss of all layers so far, and
    how each was reached: the choice before (-1 where the stage begins with this layer) and this layer's bit index."""

    used: np.ndarray
    loss: np.ndarray
    parent: np.ndarray
    width: np.ndarray


_EMPTY = _Front(*(np.zeros(0, dtype=kind) for kind in (float, float, int, int)))


def adabits(problem: Problem) -> Iterable[Assignment]:
    """The optimum at each micro-batch pair. Where the cut in proportion to memory loses no more than the best one, it
    is taken: least loss alone would as soon put all layers on one device."""
    known: dict[tuple[bytes, ...], Cut | None] = {}
    for pair in pairs(problem):
        arrays = pair_arrays(problem, *pair)
        ends = np.isfinite(arrays.embed).all(axis=0), np.isfinite(arrays.head).all(axis=0)
        key = tuple(part.tobytes() for part in (arrays.capacity, arrays.available, *ends))
        if key not in known:
            known[key] = _least_loss(arrays, split_by_memory(problem))
        if (cut := known[key]) is not None:
            stages = tuple(
                StageAssignment(problem.devices[d].name, first, first + len(bits), tuple(problem.bits[b] for b in bits))
                for d, first, bits in cut
            )
            yield Assignment(stages, *pair)


def split_by_memory(problem: Problem) -> list[int]:
    """Layers of each device in proportion to its memory, largest remainders first; empty where there is no memory."""
    memory = np.array([device.memory_bytes for device in problem.devices], dtype=float)
    if memory.sum() <= 0:
        return []
    share = problem.layers * memory / memory.sum()
    sizes = np.floor(share).astype(int)
    for d in np.argsort(sizes - share, kind="stable")[: problem.layers - int(sizes.sum())]:
        sizes[d] += 1
    return sizes.tolist()


def _least_loss(arrays: PairArrays, sizes: list[int]) -> Cut | None:
    limit, best = np.inf, None
    edges = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    stages = [(d, int(edges[d]), int(edges[d + 1])) for d in range(len(sizes)) if sizes[d]]
    found = [_fill(arrays, *stage) for stage in stages]
    if found and all(entry is not None for entry in found):
        limit = sum(loss for loss, _ in found)
        best = [(d, first, bits) for (d, first, _), (_, bits) in zip(stages, found, strict=True)]
    layers = len(arrays.sensitivity)
    if arrays.tied_head:  # one device alone holds the shared weight once, which the cuts below do not know
        for d in range(len(arrays.capacity)):
            alone = _fill(arrays, d, 0, layers)
            if alone is not None and alone[0] < limit * (1 - 1e-12):
                limit, best = alone[0], [(d, 0, alone[1])]
    cut = _search_cuts(arrays, limit * (1 - 1e-12))
    return best if cut is None else cut


def _fill(arrays: PairArrays, d: int, first: int, last: int) -> tuple[float, list[int]] | None:
    """(loss, bit indices) of the least lossy stage [first, last) on device d; None if it does not fit."""
    head = charge_head(arrays, first == 0, last == len(arrays.sensitivity))
    fronts = {}
    front = _EMPTY
    for i in range(first, last):
        front = _add_layer(arrays, d, i, front, 0.0 if i == first else np.inf, head if i + 1 == last else 0.0)
        fronts[i + 1] = front
    if not len(front.loss):
        return None
    choice = int(front.loss.argmin())
    return float(front.loss[choice]), _trace(fronts.__getitem__, last, choice)[1]


def _search_cuts(arrays: PairArrays, limit: float) -> Cut | None:
    """The cut and the widths of least loss below the limit, devices in order; None if there are none."""
    layers = len(arrays.sensitivity)
    left = np.where(arrays.available.any(axis=0), arrays.sensitivity, np.inf).min(axis=1)
    left = np.append(np.cumsum(left[::-1])[::-1], 0.0)  # the least that the layers behind lose
    if not left[0] < limit:
        return None
    # closed[i]: least loss of the first i layers on the devices before; came[i]: (device, choice) that ends there
    closed, came = np.full(layers + 1, np.inf), [None] * (layers + 1)
    closed[0] = 0.0
    fronts: dict[tuple[int, int], _Front] = {}
    before = []
    for d in range(len(arrays.capacity)):
        opened, front = closed.copy(), _EMPTY
        before.append(list(came))
        for i in range(layers):
            head = arrays.head_bytes if i + 1 == layers else 0.0
            front = _add_layer(arrays, d, i, front, opened[i], head, limit - left[i + 1])
            fronts[d, i + 1] = front
            if len(front.loss) and front.loss[-1] < closed[i + 1]:
                closed[i + 1], came[i + 1] = front.loss[-1], (d, len(front.loss) - 1)
    if came[layers] is None:
        return None
    cut: Cut = []
    last, end = layers, came[layers]
    while last:
        d, choice = end
        first, bits = _trace(lambda i, d=d: fronts[d, i], last, choice)
        cut.append((d, first, bits))
        last, end = first, before[d][first]
    return cut[::-1]


def _add_layer(
    arrays: PairArrays, d: int, i: int, front: _Front, opened: float, head: float, limit: float = np.inf
) -> _Front:
    """The front with layer i on device d, also as the first of a stage whose layers before lose `opened`."""
    used, loss, parent = front.used, front.loss, np.arange(len(front.loss))
    if np.isfinite(opened):
        used = np.concatenate([used, [arrays.embed_bytes if i == 0 else 0.0]])
        loss, parent = np.concatenate([loss, [opened]]), np.concatenate([parent, [-1]])
    widths = arrays.available[d].nonzero()[0]
    if not len(used) or not len(widths):
        return _EMPTY
    ends = [arrays.embed[:, d]] * (i == 0) + [arrays.head[:, d]] * (i + 1 == len(arrays.sensitivity))
    if not all(np.isfinite(end).all() for end in ends):
        return _EMPTY
    size = (used[:, None] + arrays.layer_bytes[i, widths]).ravel()
    lost = (loss[:, None] + arrays.sensitivity[i, widths]).ravel()
    kept = ((size <= arrays.capacity[d] - head) & (lost < limit)).nonzero()[0]
    if not len(kept):
        return _EMPTY
    kept = kept[np.lexsort((lost[kept], size[kept]))]
    best = np.minimum.accumulate(lost[kept])
    kept = kept[lost[kept] < np.concatenate([[np.inf], best[:-1]])]
    return _Front(size[kept], lost[kept], parent[kept // len(widths)], widths[kept % len(widths)])


def _trace(front_at: Callable[[int], _Front], last: int, choice: int) -> tuple[int, list[int]]:
    """(first layer, bit indices) of the stage that ends before layer `last` with a choice of its front."""
    bits, i = [], last
    while choice >= 0:
        front = front_at(i)
        bits.append(int(front.width[choice]))
        choice, i = int(front.parent[choice]), i - 1
    return i, bits[::-1]
