"""A plan simulated with the engine's schedule (`scheduler.simulator`): event by event what the formula says at once."""

from __future__ import annotations

from ds_llmpq.plan import Assignment
from ds_llmpq.planner.objective import link_seconds, stage_seconds
from ds_llmpq.planner.problem import Problem
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.simulator import SimulatedRun, simulate

MOST_PASSES = 20_000  # a second of simulation, and what a trace viewer still opens with ease


class PlannedTimes:
    """`StageTimes` of an assignment from the problem's tables. A micro-batch smaller than any candidate, as the last
    one may be, counts as the next larger candidate; decode passes all count at the mean length."""

    def __init__(self, problem: Problem, assignment: Assignment):
        self.problem, self.assignment = problem, assignment
        self.stages = len(assignment.stages)
        self._work: dict[tuple[int, str, int], float] = {}
        self._links: dict[tuple[str, int], tuple[float, ...]] = {}

    def work(self, stage: int, phase: str, rows: int, tokens: int, past: int) -> float:
        key = (stage, phase, rows)
        if key not in self._work:
            size = self._candidate(phase, rows)
            self._work[key] = stage_seconds(self.problem, self.assignment.stages[stage], phase, size)
        return self._work[key]

    def hop(self, stage: int, phase: str, rows: int, tokens: int) -> float:
        return self._link(phase, rows)[stage]

    def back(self, stage: int, rows: int) -> float:
        return self._link("decode", rows)[-1]

    def _link(self, phase: str, rows: int) -> tuple[float, ...]:
        if (phase, rows) not in self._links:
            self._links[phase, rows] = link_seconds(self.problem, self.assignment.stages, phase, rows)
        return self._links[phase, rows]

    def _candidate(self, phase: str, rows: int) -> int:
        sizes = getattr(self.problem.micro_batches, phase)
        return min((size for size in sizes if size >= rows), default=max(sizes))


def simulate_plan(problem: Problem, assignment: Assignment, row_buckets: bool = False) -> SimulatedRun | None:
    """The plan's own workload, all rows alike; None where that is too many passes to be worth it. `row_buckets`: as
    passes that are captured have them."""
    workload, rows = problem.workload, problem.workload.sequences
    eta, xi = assignment.prefill_micro_batch, assignment.decode_micro_batch
    passes = -(-rows // eta) + -(-rows // xi) * (workload.generated_tokens - 1)
    if passes * len(assignment.stages) > MOST_PASSES:
        return None
    limits = MicroBatchLimits(eta, eta * workload.prompt_tokens, xi, row_buckets=row_buckets)
    lengths = [(workload.prompt_tokens, workload.generated_tokens)] * rows
    return simulate(PlannedTimes(problem, assignment), lengths, rows, limits)
