"""From a path to a plan: better multipliers and whole-number widths for the stages on it.

`refine` climbs the Lagrangian dual of one stage and feeds the pool of `StageBounds`; `choose_widths` takes the best
feasible minimiser over the pool and improves it by exchanging single layers.
"""

import itertools

import numpy as np

from ds_llmpq.planner.linear import minimise
from ds_llmpq.planner.search.stage_bounds import NEVER, Box, StageBounds

STEPS = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
DROPS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
FACTORS = (4.0, 2.0, 1.4, 1.15, 1.05)
_EXCESS = 1000.0


def refine(stages: StageBounds, q: int, first: int, last: int, box: Box, pass_weight: float, cost: float) -> bool:
    """Add the best multipliers found for layers [first, last) on kind q, if they raise its bound noticeably.

    `cost` is what whole-number widths cost; when the bound is near it already, nothing is tried.
    """
    base = np.array([1.0, pass_weight, 0.0])
    limits = stages.limits(q, box, first == 0, last == stages.layers)
    prices = _Prices(stages, q, first, last)

    def values(surplus: np.ndarray) -> np.ndarray:
        return prices.minima(surplus + base).sum(axis=1) - surplus @ limits

    usable = stages.pools[q] - base
    usable = usable[(usable >= -1e-12).all(axis=1)]
    known = values(usable)
    best, value = usable[np.argmax(known)], known.max()
    before = value
    if cost - value < 2e-3 * abs(cost):
        return False
    floor = np.abs(stages.pools[q]).max(axis=0) * 1e-3 + 1e-12
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
        # no widths fit: two constraints exclude one another, and only both multipliers together raise the bound
        best = prices.excluding(base, limits, abs(before))
        value = values(best[None])[0] if best is not None else before
    if value <= before + 5e-4 * abs(before):
        return False
    stages.add(q, (best + base)[None])
    return True


class _Prices:
    """Priced minima of the layers of one stage, for many multipliers at once."""

    def __init__(self, stages: StageBounds, q: int, first: int, last: int):
        rows = slice(first, last)
        self.prefill, self.decode = stages.prefill[q], stages.decode[q]
        self.bytes = stages.bytes[rows]
        self.fixed = stages.theta * stages.arrays.omega[rows] + stages.blocked[rows] + stages.absent[q]

    def all(self, multipliers: np.ndarray) -> np.ndarray:
        """[M, k, B]."""
        times = multipliers[:, :1] * self.prefill + multipliers[:, 1:2] * self.decode
        return times[:, None, :] + multipliers[:, 2, None, None] * self.bytes + self.fixed

    def minima(self, multipliers: np.ndarray) -> np.ndarray:
        """[M, k]."""
        return self.all(multipliers).min(axis=2)

    def excluding(self, base: np.ndarray, limits: np.ndarray, scale: float) -> np.ndarray | None:
        """Multipliers [3] beyond `base` at the optimum of the linear program over fractional widths, where exceeding a
        limit by one part in `_EXCESS` costs `scale`: bounded, and great where no widths keep all limits."""
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


def choose_widths(
    stages: StageBounds, q: int, first: int, last: int, box: Box, pass_weight: float
) -> tuple[np.ndarray | None, float]:
    """Width indices [k] of a good feasible choice (or None) and what they cost."""
    limits = stages.limits(q, box, first == 0, last == stages.layers)
    if last - first <= stages.compositions.long and stages.costs[q].same_bytes:
        return stages.costs[q].choose(limits, pass_weight, stages.theta, first, last - first)
    prices = _Prices(stages, q, first, last)
    limits = limits + 1e-12 * np.abs(limits)
    chosen = prices.all(stages.pools[q]).argmin(axis=2)  # [M, k]
    chosen = np.unique(chosen, axis=0)
    use = np.stack([prices.prefill[chosen].sum(1), prices.decode[chosen].sum(1), _bytes(prices, chosen)], axis=1)
    rows = np.arange(last - first)
    cost_of = prices.prefill + pass_weight * prices.decode + prices.fixed  # [k, B]
    cost = cost_of[rows, chosen].sum(axis=1)
    excess = np.clip((use - limits) / np.maximum(np.abs(limits), 1e-12), 0, None).sum(axis=1)
    fits = excess <= 0
    m = int(np.argmin(np.where(fits, cost, np.inf))) if fits.any() else int(np.argmin(excess))
    widths = _exchange(prices, chosen[m].copy(), limits, cost_of)
    return widths, float(cost_of[rows, widths].sum()) if widths is not None else np.inf


def _bytes(prices: _Prices, chosen: np.ndarray) -> np.ndarray:
    return np.take_along_axis(prices.bytes[None], chosen[:, :, None], axis=2)[:, :, 0].sum(axis=1)


def _exchange(prices: _Prices, widths: np.ndarray, limits: np.ndarray, cost_of: np.ndarray) -> np.ndarray | None:
    """Change one layer at a time: first towards feasibility, then towards lower cost."""
    rows = np.arange(len(widths))
    parts = np.stack(np.broadcast_arrays(prices.prefill[None], prices.decode[None], prices.bytes), axis=2)  # [k, B, 3]
    unit = np.maximum(np.abs(limits), 1e-12)
    for _ in range(4 * len(widths) + 4):
        now = parts[rows, widths]
        use = now.sum(axis=0)
        after = use + parts - now[:, None, :]  # [k, B, 3]
        rise = cost_of - cost_of[rows, widths][:, None]
        excess = np.clip((use - limits) / unit, 0, None).sum()
        later = np.clip((after - limits) / unit, 0, None).sum(axis=2)
        if excess > 0:
            gain = np.where((later < excess - 1e-12) & (rise < NEVER / 2), excess - later, 0.0)
            if not gain.any():
                return None
            score = np.where(gain > 0, gain / np.maximum(rise, 1e-9 * np.abs(cost_of).min() + 1e-15), -np.inf)
        else:
            score = np.where((later <= 0) & (rise < -1e-12 * np.abs(cost_of).min()), -rise, -np.inf)
            if not np.isfinite(score).any():
                return widths
        i, b = np.unravel_index(int(np.argmax(score)), score.shape)
        widths[i] = b
    return widths if (parts[rows, widths].sum(axis=0) <= limits).all() else None
