"""From a path to a plan: better multipliers and whole-number bit widths for the stages on it.

`find_multipliers` climbs the Lagrangian dual of one stage; `choose_bits` takes the best feasible minimiser over the
multipliers known and improves it by exchanging single layers.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from ds_llmpq.planner.linear import minimise
from ds_llmpq.planner.search.stage_bounds import NEVER, Box, Prices, StageBounds

STEPS = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
DROPS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
FACTORS = (4.0, 2.0, 1.4, 1.15, 1.05)
_EXCESS = 1000.0


@dataclass(frozen=True)
class Place:
    """Layers [first, last) on kind q of device, within a box and at the prices of its node."""

    stages: StageBounds
    q: int
    first: int
    last: int
    box: Box
    prices: Prices

    @property
    def limits(self) -> np.ndarray:
        """[3]: what P, D and memory the layers may take."""
        return self.stages.limits(self.q, self.box, self.first == 0, self.last == self.stages.layers)


def find_multipliers(place: Place, pool: np.ndarray, cost: float) -> np.ndarray | None:
    """The best multipliers [3] found, if they raise the bound of the stage noticeably above that of `pool` [M, 3].

    `cost` is what whole-number bit widths cost; when the bound is near it already, nothing is tried.
    """
    base = np.array([1.0, place.prices.pass_weight, 0.0])
    limits = place.limits
    layers = _Layers(place)

    def values(surplus: np.ndarray) -> np.ndarray:
        return layers.minima(surplus + base).sum(axis=1) - surplus @ limits

    usable = pool - base
    usable = usable[(usable >= -1e-12).all(axis=1)]
    known = values(usable)
    best, value = usable[np.argmax(known)], known.max()
    before = value
    if cost - value < 2e-3 * abs(cost):
        return None
    floor = np.abs(pool).max(axis=0) * 1e-3 + 1e-12
    for factor in FACTORS:
        for _ in range(2):
            tried = np.maximum(best, floor) * factor**STEPS
            if factor == FACTORS[0]:
                tried = np.concatenate([tried, best * DROPS])
            found = values(tried)
            if found.max() <= value + 1e-12 * abs(value):
                break
            best, value = tried[np.argmax(found)], found.max()
    if value <= before + 5e-4 * abs(before) and not np.isfinite(cost):
        # no bit widths fit: two constraints exclude one another, and only both multipliers together raise the bound
        best = layers.excluding(base, limits, abs(before))
        value = values(best[None])[0] if best is not None else before
    if value <= before + 5e-4 * abs(before):
        return None
    return best + base


class _Layers:
    """Priced minima of the layers of one stage, for many multipliers at once."""

    def __init__(self, place: Place):
        stages, q, rows = place.stages, place.q, slice(place.first, place.last)
        self.prefill, self.decode = stages.prefill[q], stages.decode[q]
        self.bytes = stages.bytes[rows]
        self.fixed = place.prices.theta * stages.arrays.sensitivity[rows] + stages.blocked[rows] + stages.absent[q]

    def all(self, multipliers: np.ndarray) -> np.ndarray:
        """[M, k, B]."""
        times = multipliers[:, :1] * self.prefill + multipliers[:, 1:2] * self.decode
        return times[:, None, :] + multipliers[:, 2, None, None] * self.bytes + self.fixed

    def minima(self, multipliers: np.ndarray) -> np.ndarray:
        """[M, k]."""
        return self.all(multipliers).min(axis=2)

    def excluding(self, base: np.ndarray, limits: np.ndarray, scale: float) -> np.ndarray | None:
        """Multipliers [3] beyond `base` at the optimum of the linear program over fractional widths, where exceeding a
        limit by one part in `_EXCESS` costs `scale`: bounded, and great where no bit widths keep all limits."""
        use = np.stack(np.broadcast_arrays(self.prefill[None], self.decode[None], self.bytes))  # [3, k, B]
        penalty = _EXCESS * scale / np.maximum(np.abs(limits), 1e-12)
        layers, widths = np.nonzero(self.fixed < NEVER / 2)  # one variable each
        cost = np.tensordot(base, use, axes=1) + self.fixed
        chosen = np.equal.outer(np.arange(len(self.fixed)), layers).astype(float)
        columns = len(layers) + 3
        found = minimise(
            np.concatenate([cost[layers, widths], penalty]),
            np.hstack([use[:, layers, widths], -np.eye(3)]),
            limits,
            np.zeros(columns),
            np.full(columns, np.inf),
            np.hstack([chosen, np.zeros((len(chosen), 3))]),
            np.ones(len(chosen)),
        )
        return None if found is None else np.maximum(-found.upper_prices, 0.0)


def choose_bits(place: Place, pool: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Bit-width indices [k] of a good feasible choice (or None) and what they cost; tries the multipliers `pool`."""
    stages, limits, length = place.stages, place.limits, place.last - place.first
    if length <= stages.compositions.long and stages.costs[place.q].same_bytes:
        costs, prices = stages.costs[place.q], place.prices
        return costs.choose(limits, prices.pass_weight, prices.theta, place.first, length)
    layers = _Layers(place)
    limits = limits + 1e-12 * np.abs(limits)
    chosen = layers.all(pool).argmin(axis=2)  # [M, k]
    chosen = np.unique(chosen, axis=0)
    use = np.stack([layers.prefill[chosen].sum(1), layers.decode[chosen].sum(1), _bytes(layers, chosen)], axis=1)
    rows = np.arange(length)
    price = layers.prefill + place.prices.pass_weight * layers.decode + layers.fixed  # [k, B]
    cost = price[rows, chosen].sum(axis=1)
    excess = np.clip((use - limits) / np.maximum(np.abs(limits), 1e-12), 0, None).sum(axis=1)
    fits = excess <= 0
    m = int(np.argmin(np.where(fits, cost, np.inf))) if fits.any() else int(np.argmin(excess))
    bits = _exchange(layers, chosen[m].copy(), limits, price)
    return bits, float(price[rows, bits].sum()) if bits is not None else np.inf


def _bytes(layers: _Layers, chosen: np.ndarray) -> np.ndarray:
    return np.take_along_axis(layers.bytes[None], chosen[:, :, None], axis=2)[:, :, 0].sum(axis=1)


def _exchange(layers: _Layers, bits: np.ndarray, limits: np.ndarray, price: np.ndarray) -> np.ndarray | None:
    """Change one layer at a time: first towards feasibility, then towards lower cost."""
    rows = np.arange(len(bits))
    parts = np.stack(np.broadcast_arrays(layers.prefill[None], layers.decode[None], layers.bytes), axis=2)  # [k, B, 3]
    unit = np.maximum(np.abs(limits), 1e-12)
    for _ in range(4 * len(bits) + 4):
        now = parts[rows, bits]
        use = now.sum(axis=0)
        after = use + parts - now[:, None, :]  # [k, B, 3]
        rise = price - price[rows, bits][:, None]
        excess = np.clip((use - limits) / unit, 0, None).sum()
        later = np.clip((after - limits) / unit, 0, None).sum(axis=2)
        if excess > 0:
            gain = np.where((later < excess - 1e-12) & (rise < NEVER / 2), excess - later, 0.0)
            if not gain.any():
                return None
            score = np.where(gain > 0, gain / np.maximum(rise, 1e-9 * np.abs(price).min() + 1e-15), -np.inf)
        else:
            score = np.where((later <= 0) & (rise < -1e-12 * np.abs(price).min()), -rise, -np.inf)
            if not np.isfinite(score).any():
                return bits
        i, b = np.unravel_index(int(np.argmax(score)), score.shape)
        bits[i] = b
    return bits if (parts[rows, bits].sum(axis=0) <= limits).all() else None
