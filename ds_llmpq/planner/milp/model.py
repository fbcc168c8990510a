"""One mixed-integer model as rows and columns, handed to Gurobi where its licence allows, else to HiGHS.

Both solvers are imported when first used. pip's Gurobi licence is restricted to 2,000 columns and rows and expires; a
licence file lifts that (`find_gurobi_licence`).
"""

import contextlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ds_llmpq.cluster.detect import count_usable_cores
from ds_llmpq.errors import UserError
from ds_llmpq.planner.linear import quiet_highs

GUROBI_RESTRICTED = 2000
GUROBI_LICENCE_ERRORS = (10009, 10010)  # expired or missing; too large for the licence
LICENCE_VARIABLE = "GRB_LICENSE_FILE"
SYSTEM_FOLDER = Path("/opt/gurobi")
MOST_THREADS = 8  # of a solver: beyond, branch and bound gains little and memory grows with each
TOLERANCE = 1e-9  # the finest both solvers take: with their defaults (1e-5, 1e-6) a plan may exceed a device's memory
ABSOLUTE_GAP = 1e-7  # of objectives scaled to about 1,000: never what stops a solver before the relative gap does


@dataclass
class Model:
    """min cost @ x, low <= x <= high, row_low <= A x <= row_high, some x integer. Grows by columns, then rows."""

    cost: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    row_low: list[float] = field(default_factory=list)
    row_high: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    indices: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def column(self, cost: float = 0.0, low: float = 0.0, high: float = math.inf, *, integer: bool = False) -> int:
        self.cost.append(cost)
        self.low.append(low)
        self.high.append(high)
        self.integer.append(integer)
        return len(self.cost) - 1

    def row(self, terms: Iterable[tuple[int, float]], low: float = -math.inf, high: float = math.inf) -> None:
        """low <= sum of coefficient * column <= high; columns may repeat."""
        merged: dict[int, float] = {}
        for index, value in terms:
            merged[index] = merged.get(index, 0.0) + value
        for index, value in merged.items():
            if value:
                self.indices.append(index)
                self.values.append(value)
        self.starts.append(len(self.indices))
        self.row_low.append(low)
        self.row_high.append(high)

    def fits_restricted_licence(self) -> bool:
        return max(len(self.cost), len(self.row_low)) <= GUROBI_RESTRICTED


@dataclass(frozen=True)
class Solution:
    """`x` is None without an incumbent; `bound` is -inf when nothing is proven, +inf when infeasible."""

    x: np.ndarray | None
    objective: float
    bound: float
    solver: str


class LicenceRefused(Exception):
    """Gurobi's licence does not allow this model."""


def find_gurobi_licence() -> Path | None:
    """The file that GRB_LICENSE_FILE names, else gurobi.lic in /opt/gurobi, the home folder, or conf/ of the folder
    that the command was started in."""
    if named := os.environ.get(LICENCE_VARIABLE):
        return Path(named)
    places = (SYSTEM_FOLDER, Path.home(), Path.cwd() / "conf")
    return next((place / "gurobi.lic" for place in places if (place / "gurobi.lic").is_file()), None)


def count_threads() -> int:
    """Threads of a solver: the processors this process may use, up to `MOST_THREADS`."""
    return min(count_usable_cores(), MOST_THREADS)


def solve_model(
    model: Model,
    solver: str = "auto",
    *,
    seconds: float = math.inf,
    gap: float = 1e-6,
    cutoff: float = math.inf,
    seed: int = 0,
) -> Solution:
    """Minimise; only solutions better than `cutoff` count, so x is None when there is none."""
    limits = (max(seconds, 0.05), gap, cutoff, seed)
    licensed = model.fits_restricted_licence() or find_gurobi_licence() is not None
    if solver == "gurobi" or (solver == "auto" and licensed):
        try:
            return _gurobi(model, *limits)
        except LicenceRefused as error:
            if solver == "gurobi":
                raise UserError(f"planner.solver=gurobi cannot be used ({error}); give planner.solver=highs.") from None
    return _highs(model, *limits)


def _gurobi(model: Model, seconds: float, gap: float, cutoff: float, seed: int) -> Solution:
    import gurobipy as gp
    from scipy.sparse import csr_matrix

    if (licence := find_gurobi_licence()) is not None:
        os.environ[LICENCE_VARIABLE] = str(licence)  # Gurobi is told of it in no other way
    try:
        env = gp.Env(params={"OutputFlag": 0})
    except gp.GurobiError as error:  # whatever is wrong with it, a licence server that cannot be reached included
        raise LicenceRefused(f"its licence does not allow it: {error}") from None
    try:
        with env, gp.Model(env=env) as m:
            kinds = [
                "B" if i and h <= 1 else ("I" if i else "C") for i, h in zip(model.integer, model.high, strict=True)
            ]
            x = m.addMVar(len(model.cost), lb=model.low, ub=model.high, obj=model.cost, vtype=kinds)
            shape = (len(model.row_low), len(model.cost))
            matrix = csr_matrix((model.values, model.indices, model.starts), shape=shape)
            low, high = np.array(model.row_low), np.array(model.row_high)
            for keep, sense, side in (
                (np.isfinite(low) & (low == high), "=", low),
                (np.isfinite(low) & (low != high), ">", low),
                (np.isfinite(high) & (low != high), "<", high),
            ):
                if keep.any():
                    m.addMConstr(matrix[keep], x, sense, side[keep])
            settings = {
                "MIPGap": gap,
                "MIPGapAbs": ABSOLUTE_GAP,
                "Seed": seed,
                "Threads": count_threads(),
                "TimeLimit": seconds,
                "IntFeasTol": TOLERANCE,
                "FeasibilityTol": TOLERANCE,
            }
            for name, value in settings.items():
                m.setParam(name, value)
            if math.isfinite(cutoff):
                m.setParam("Cutoff", cutoff)
            m.optimize()
            found = np.array(x.X) if m.SolCount else None
            if m.Status in (gp.GRB.INFEASIBLE, gp.GRB.INF_OR_UNBD, gp.GRB.CUTOFF):
                bound = cutoff if m.Status == gp.GRB.CUTOFF or math.isfinite(cutoff) else math.inf
            else:
                bound = m.ObjBound
            if m.Status == gp.GRB.INTERRUPTED:
                raise KeyboardInterrupt
            return Solution(found, m.ObjVal if m.SolCount else math.inf, bound, "gurobi")
    except gp.GurobiError as error:
        if error.errno in GUROBI_LICENCE_ERRORS:
            raise LicenceRefused(f"its licence does not allow it: {error}") from None
        raise


def _highs(model: Model, seconds: float, gap: float, cutoff: float, seed: int) -> Solution:
    import highspy

    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(model.cost), len(model.row_low)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = map(np.array, (model.cost, model.low, model.high))
    lp.row_lower_, lp.row_upper_ = np.array(model.row_low), np.array(model.row_high)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = np.array(model.starts), np.array(model.indices)
    lp.a_matrix_.value_ = np.array(model.values)
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    lp.integrality_ = [kinds[i] for i in model.integer]
    highs = quiet_highs()
    settings = {
        "time_limit": seconds,
        "mip_rel_gap": gap,
        "mip_abs_gap": ABSOLUTE_GAP,
        "random_seed": seed,
        "threads": count_threads(),
        "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE,
    }
    for name, value in settings.items():
        highs.setOptionValue(name, value)
    if math.isfinite(cutoff):
        highs.setOptionValue("objective_bound", cutoff)
    highs.HandleKeyboardInterrupt = True  # solves in a thread, so that Ctrl-C is seen at once
    highs.passModel(lp)
    with contextlib.redirect_stdout(None):
        highs.solve()
    info, status = highs.getInfo(), highs.getModelStatus()
    has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if has_solution and info.objective_function_value < cutoff:
        return Solution(
            np.array(highs.getSolution().col_value), info.objective_function_value, info.mip_dual_bound, "highs"
        )
    exhausted = status in (
        highspy.HighsModelStatus.kInfeasible,
        highspy.HighsModelStatus.kObjectiveBound,
        highspy.HighsModelStatus.kOptimal,
    )
    return Solution(None, math.inf, cutoff if exhausted else info.mip_dual_bound, "highs")
