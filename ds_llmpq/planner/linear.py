"""Small linear programs, by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import highspy


@dataclass(frozen=True)
class LinearOptimum:
    """`upper_prices` <= 0 and `equal_prices`: what the objective rises by per unit of a row's right-hand side."""

    x: np.ndarray
    objective: float
    upper_prices: np.ndarray
    equal_prices: np.ndarray


class Infeasible(Exception):
    """No point satisfies all rows."""


def minimise(
    cost: np.ndarray,
    upper: np.ndarray,
    sides: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    equal: np.ndarray | None = None,
    totals: np.ndarray | None = None,
) -> LinearOptimum | None:
    """min cost @ x subject to upper @ x <= sides, equal @ x = totals, low <= x <= high.

    None if the solver gives up; raises `Infeasible` if it proves that there is no such x.
    """
    if equal is None or totals is None:
        equal, totals = np.zeros((0, len(cost))), np.zeros(0)
    import highspy

    rows = np.concatenate([upper, equal])
    at, columns = np.nonzero(rows)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(cost), len(rows)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, low, high
    lp.row_lower_ = np.concatenate([np.full(len(sides), -highspy.kHighsInf), totals])
    lp.row_upper_ = np.concatenate([sides, totals])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.searchsorted(at, np.arange(len(rows) + 1)).astype(np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = columns.astype(np.int32), rows[at, columns]
    highs = quiet_highs()
    highs.setOptionValue("threads", 1)
    highs.passModel(lp)
    highs.run()
    if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        raise Infeasible
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = highs.getSolution()
    prices = np.array(solution.row_dual)
    return LinearOptimum(
        np.array(solution.col_value),
        highs.getInfo().objective_function_value,
        prices[: len(sides)],
        prices[len(sides) :],
    )


def quiet_highs() -> highspy.Highs:
    """A HiGHS that prints nothing, not even its name: that comes with its callbacks, before an option can be set."""
    import highspy

    class Quiet(highspy.Highs):
        def enableCallbacks(self) -> None:
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Quiet()
