"""The pool of multipliers of one micro-batch pair, and the priced layers that belong to it.

The only thing of a relaxation that changes: `Relaxation.rounded` adds what `rounding.find_multipliers` finds. More
multipliers never weaken a bound.
"""

import numpy as np

from ds_llmpq.planner.search.stage_bounds import StageBounds


class Multipliers:
    """`pools[q]` [M, 3]: multipliers of the limits on P, D and memory for kind q of device."""

    def __init__(self, stages: StageBounds):
        self._stages = stages
        self.pools = [stages.first_multipliers(q) for q in range(stages.kinds)]
        self._known: tuple[float, list[np.ndarray]] | None = None  # theta and its tables: splits seldom change theta

    def at(self, theta: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per kind the pool [M, 3] and `StageBounds.price_layers` [M, L, K] of it."""
        if self._known is None or self._known[0] != theta:
            self._known = theta, [self._stages.price_layers(q, pool, theta) for q, pool in enumerate(self.pools)]
        return list(zip(self.pools, self._known[1], strict=True))

    def add(self, q: int, multipliers: np.ndarray) -> None:
        """Put multipliers [m, 3] into the pool of a kind."""
        self.pools[q] = np.concatenate([self.pools[q], multipliers])
        if self._known is not None:
            theta, tables = self._known
            tables[q] = np.concatenate([tables[q], self._stages.price_layers(q, multipliers, theta)])
