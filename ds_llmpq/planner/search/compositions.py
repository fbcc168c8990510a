"""Exact costs of stages by composition: no Lagrangian gap, which matters where stages are short.

Times depend on how many layers take each width, not on which; loss depends on which. For every composition of k layers
into bit widths the least loss of layers [a, a + k) is a small dynamic program, shared by all kinds and boxes. The exact
cost of a stage is then the minimum over the compositions that keep its limits. Short lengths are always priced this
way, longer ones only where the search asks. Bytes are taken per width as the least over all layers: exact when layers
are alike, a bound otherwise.
"""

import itertools
import math
from functools import cached_property

import numpy as np

SHORT_ENTRIES = 120_000  # compositions times layers that are priced for every box
LONG_ENTRIES = 3_000_000  # and those that may be kept at all


class Compositions:
    """Ways to give k layers bit widths: `counts(k)` [n, B] and `loss(k)` [n, L], the least loss by first layer.

    Lengths up to `short` are priced for every box, lengths up to `long` can be built when needed. A first layer that is
    too late for the length has the loss `never`.
    """

    def __init__(self, sensitivity: np.ndarray, allowed: np.ndarray, never: float):
        self.layers, self.widths = sensitivity.shape
        self.price = np.where(allowed, sensitivity, never)
        self.never = never
        self.short = self._lengths_within(SHORT_ENTRIES)
        self.long = self._lengths_within(LONG_ENTRIES)
        self._counts = [np.zeros((1, self.widths), dtype=np.int64)]
        self._loss = [np.zeros((1, self.layers + 1))]
        self._index: list[dict[tuple[int, ...], int]] = [{(0,) * self.widths: 0}]

    def _lengths_within(self, entries: int) -> int:
        total, length = 0, 0
        while length < self.layers:
            total += math.comb(length + self.widths, self.widths - 1) * self.layers
            if total > entries:
                break
            length += 1
        return length

    def counts(self, length: int) -> np.ndarray:
        self._build(length)
        return self._counts[length]

    def loss(self, length: int) -> np.ndarray:
        self._build(length)
        return self._loss[length][:, : self.layers]

    @cached_property
    def short_loss(self) -> np.ndarray:
        """[n, L]: the losses of all short lengths, one length after the other."""
        return np.concatenate([np.zeros((0, self.layers)), *map(self.loss, range(1, self.short + 1))])

    @cached_property
    def short_length(self) -> np.ndarray:
        """[n]: the length of each row of `short_loss`."""
        return np.repeat(np.arange(1, self.short + 1), [len(self.counts(k)) for k in range(1, self.short + 1)])

    def _build(self, length: int) -> None:
        while len(self._counts) <= length:
            self._extend(len(self._counts))

    def _extend(self, length: int) -> None:
        """From compositions of one layer less: the last layer takes one of the widths."""
        rows = _compositions(length, self.widths)
        first = self.layers - length + 1  # number of possible first layers
        best = np.full((len(rows), self.layers + 1), self.never)
        for b in range(self.widths):
            taken = np.flatnonzero(rows[:, b])
            shorter = rows[taken].copy()
            shorter[:, b] -= 1
            source = [self._index[-1][tuple(row)] for row in shorter.tolist()]
            last_layer = self.price[length - 1 : self.layers, b]
            best[taken, :first] = np.minimum(best[taken, :first], self._loss[-1][source, :first] + last_layer)
        self._counts.append(rows)
        self._loss.append(best)
        self._index.append({tuple(row): i for i, row in enumerate(rows.tolist())})

    def best_widths(self, row: int, length: int, first: int) -> np.ndarray:
        """Width indices of layers [first, first + length) that reach the least loss of a composition."""
        counts = self._counts[length][row].copy()
        chosen = np.zeros(length, dtype=np.int64)
        for position in range(length - 1, -1, -1):
            values = np.full(self.widths, np.inf)
            for b in np.flatnonzero(counts):
                shorter = counts.copy()
                shorter[b] -= 1
                before = self._loss[position][self._index[position][tuple(shorter.tolist())], first]
                values[b] = before + self.price[first + position, b]
            chosen[position] = b = int(np.argmin(values))
            counts[b] -= 1
        return chosen


class StageCosts:
    """Compositions priced for one kind of device."""

    def __init__(self, compositions: Compositions, prefill: np.ndarray, decode: np.ndarray, layer_bytes: np.ndarray):
        self.table = compositions
        self.weights = np.stack([prefill, decode, layer_bytes.min(axis=0)], axis=1)  # [B, 3]
        self.same_bytes = bool((layer_bytes == layer_bytes[:1]).all())
        self._uses: dict[int, np.ndarray] = {}
        lengths = range(1, compositions.short + 1)
        self.short_uses = np.concatenate([np.zeros((0, 3)), *(self.uses(k) for k in lengths)])

    def uses(self, length: int) -> np.ndarray:
        """[n, 3]: P, D and bytes of each composition."""
        if length not in self._uses:
            self._uses[length] = self.table.counts(length) @ self.weights
        return self._uses[length]

    def least_short(
        self, limits: np.ndarray, pass_weight: float, theta: float, first: np.ndarray | None = None
    ) -> np.ndarray:
        """[short, L] at (k - 1, a): least P + a_D D + theta * loss within the limits [3]. With `first[k - 1]`, a first
        layer for each length: [short, 1], at that layer alone."""
        found = np.full((self.table.short, self.table.layers if first is None else 1), np.inf)
        rows = np.flatnonzero(_keeps(self.short_uses, limits))
        if len(rows):
            lengths = self.table.short_length[rows]
            table = self.table.short_loss
            loss = table[rows] if first is None else table[rows, first[lengths - 1]][:, None]
            times = self.short_uses[rows, 0] + pass_weight * self.short_uses[rows, 1]
            cost = times[:, None] + theta * loss
            heads = np.flatnonzero(np.diff(lengths, prepend=0))
            found[lengths[heads] - 1] = np.minimum.reduceat(cost, heads, axis=0)
        return found

    def least(self, length: int, limits: np.ndarray, pass_weight: float, theta: float) -> np.ndarray:
        """[L] by first layer: the same for any one length up to `long`."""
        uses = self.uses(length)
        rows = np.flatnonzero(_keeps(uses, limits))
        if not len(rows):
            return np.full(self.table.layers, np.inf)
        times = uses[rows, 0] + pass_weight * uses[rows, 1]
        return (times[:, None] + theta * self.table.loss(length)[rows]).min(axis=0)

    def choose(
        self, limits: np.ndarray, pass_weight: float, theta: float, first: int, length: int
    ) -> tuple[np.ndarray | None, float]:
        """Best bit widths of layers [first, first + length) and their cost; (None, inf) if nothing keeps the limits."""
        uses = self.uses(length)
        rows = np.flatnonzero(_keeps(uses, limits))
        if not len(rows):
            return None, np.inf
        cost = uses[rows, 0] + pass_weight * uses[rows, 1] + theta * self.table.loss(length)[rows, first]
        cost = np.where(self.table.loss(length)[rows, first] >= self.table.never / 2, np.inf, cost)
        best = int(np.argmin(cost))
        if not cost[best] < self.table.never / 2:
            return None, np.inf
        return self.table.best_widths(int(rows[best]), length, first), float(cost[best])


def _keeps(uses: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """[n] bool: P, D and memory within the limits, but for rounding."""
    return (uses <= limits + 1e-9 * np.abs(limits)).all(axis=1)


def _compositions(total: int, parts: int) -> np.ndarray:
    """[n, parts]: all ways to write `total` as an ordered sum of `parts` non-negative integers."""
    bars = itertools.combinations(range(total + parts - 1), parts - 1)
    edges = np.array([(-1, *bar, total + parts - 1) for bar in bars])
    return np.diff(edges, axis=1) - 1
