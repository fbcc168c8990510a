"""The best plan so far: judged by the contract's formula and the independent checker, never by a solver's word."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ds_llmpq.plan import Assignment
from ds_llmpq.planner.objective import Prediction, evaluate, objective_value, tie_value, violations
from ds_llmpq.planner.problem import Problem


@dataclass(frozen=True)
class ProgressEvent:
    """What a progress callback receives: seconds so far, best objective, proven bound, relative gap
    (None while there is no plan, or a bound of zero)."""

    seconds: float
    incumbent: float | None
    bound: float | None
    gap: float | None


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / bound: how far above the optimum the objective can be at most. Zero when they meet,
    infinite while the bound is zero."""
    if bound >= objective:
        return 0.0
    return (objective - bound) / bound if bound > 0 else math.inf


def sufficient_bound(objective: float, gap: float) -> float:
    """The bound at which an objective is proven to be within the relative gap."""
    return objective / (1 + gap)


@dataclass
class Incumbent:
    """Keeps the best feasible assignment; the objective decides, ties go to the faster (or better) plan."""

    problem: Problem
    accepts: Callable[[Assignment], bool] = lambda assignment: True
    assignment: Assignment | None = None
    prediction: Prediction | None = None
    value: float = math.inf
    tie: float = math.inf
    bound: float = 0.0
    most_bound: float = math.inf  # what is proven of the plans that the search does not see
    started: float = field(default_factory=time.monotonic)
    progress: Callable[[ProgressEvent], None] | None = None

    def offer(self, assignment: Assignment) -> bool:
        """Take the assignment if it is feasible and better; tells whether it was taken."""
        if violations(self.problem, assignment) or not self.accepts(assignment):
            return False
        prediction = evaluate(self.problem, assignment)
        value, tie = objective_value(self.problem, prediction), tie_value(self.problem, prediction)
        if (value, tie) >= (self.value, self.tie):
            return False
        self.assignment, self.prediction, self.value, self.tie = assignment, prediction, value, tie
        self.report()
        return True

    def raise_bound(self, bound: float) -> None:
        """A proven bound on every plan that the search sees; bounds only grow, and never pass the incumbent."""
        bound = min(bound, self.value, self.most_bound)
        if bound > self.bound:
            self.bound = float(bound)
            self.report()

    @property
    def gap(self) -> float:
        return relative_gap(self.value, self.bound) if math.isfinite(self.value) else math.inf

    def is_within(self, gap: float) -> bool:
        """Whether the gap is at most that one; a bound raised to just what is sufficient is, however it rounds."""
        return self.gap <= gap + 1e-12

    def report(self) -> None:
        if self.progress is not None:
            value = self.value if math.isfinite(self.value) else None
            gap = self.gap if math.isfinite(self.gap) else None
            self.progress(ProgressEvent(time.monotonic() - self.started, value, self.bound, gap))
