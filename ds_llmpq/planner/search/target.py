"""The bound at which a box of the search need not be looked at."""

import math
from dataclasses import dataclass

from ds_llmpq.planner.incumbent import Incumbent, sufficient_bound


@dataclass(frozen=True)
class Target:
    """Follows the incumbent: a better plan lowers the target. `ceiling`: what no plan can reach."""

    best: Incumbent
    gap: float
    ceiling: float

    @property
    def value(self) -> float:
        """What has at least this bound holds no plan that improves on the incumbent by more than the gap."""
        return sufficient_bound(self.best.value, self.gap) if math.isfinite(self.best.value) else self.ceiling

    def met_by(self, bound: float) -> bool:
        """Whether a proven bound on all plans, or the incumbent's own, closes the gap."""
        return self.best.value <= bound or self.best.gap <= self.gap
