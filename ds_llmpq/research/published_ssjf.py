"""The schedules of the published SSJF simulator (arXiv 2404.08509), with its errors; `queue_simulator` has none of
them.

These errors are kept on purpose: first come, first served waits for partial batches, while shortest-first does not. The
starvation guard knows the true duration. Idle time counts as waiting, even for jobs that have not arrived. A predicted
class counts as a number of tokens. Predicted durations do not shrink with progress. The last job to arrive is lost if
nothing is queued before it.

The published evaluation runs 50 jobs whose gaps are sorted, smallest first, and takes throughput when a quarter of the
jobs is done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MaxLen

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json
from ds_llmpq.lengths.records import Tokens
from ds_llmpq.research.scenario import Lengths
from ds_llmpq.scheduler.jobs import Jobs
from ds_llmpq.validation import Count, Many, Number, Positive, Seconds, one_of, validate

CONSTANT_SECONDS = 0.1
PER_TOKEN_SECONDS = 0.02
MODES = ("NO_BATCHING", "STATIC_BATCHING", "DYNAMIC_BATCHING")
JOBS = 50
_MODES = dict(zip(("none", "static", "dynamic"), MODES, strict=True))  # by our names of batching
Completion = dict[str, dict[str, float]]


@dataclass(frozen=True)
class CaseGuard:
    """When jobs are ordered by waiting time: once one has waited `threshold` seconds, or `coefficient` of its run
    times."""

    threshold: Seconds = 100.0
    coefficient: Number = 10.0


@dataclass(frozen=True)
class Case:
    """One published experiment, with the keys of its file. The lists have an entry per job; jobs are named by their
    index. Times are in seconds."""

    mode: one_of(*MODES)
    arrival: Annotated[Many[Seconds], MaxLen(100_000)]
    generated_tokens: Annotated[Many[Tokens], MaxLen(100_000)]
    predicted_class: Annotated[Many[Count], MaxLen(100_000)]
    max_batch: Positive = 1
    batch_wait_timeout: Seconds = 10.0
    starvation: CaseGuard = field(default_factory=CaseGuard)

    @property
    def dynamic(self) -> bool:
        """Whether a batch ends with its shortest job instead of its longest."""
        return self.mode == "DYNAMIC_BATCHING"


@dataclass
class _Job:
    index: int
    arrival: float
    remaining: float
    predicted: float
    waited: float = 0.0


@dataclass
class _Clock:
    now: float = 0.0
    previous: float = 0.0
    completed: dict[int, float] = field(default_factory=dict)


def read_cases(path: Path) -> list[Case]:
    """Cases from a JSON list, as in the golden files. `UserError`: unreadable, or of another form."""
    rows = read_json(path, "file of cases", "give a JSON list of cases")
    if not isinstance(rows, list):
        raise UserError(f"cases={path} holds no list; give a JSON list with one object per case.")
    return [_case(row, f"{path}, case {number}") for number, row in enumerate(rows)]


def schedules(case: Case) -> Completion:
    """Completion seconds by policy (`fcfs`, `sjf`, `ssjf`) and job, in the order the jobs end."""
    found = {
        "fcfs": _first_come(case),
        "sjf": _shortest_first(case, predicted=False),
        "ssjf": _shortest_first(case, predicted=True),
    }
    return {name: {str(job): round(end, 9) for job, end in ends.items()} for name, ends in found.items()}


def _case(row: Any, where: str) -> Case:
    case = validate(Case, row, where, "correct the case", ignore_unknown=True)
    if not len(case.arrival) == len(case.generated_tokens) == len(case.predicted_class):
        raise UserError(f"{where}: arrival, generated_tokens and predicted_class must each have one entry per job.")
    return case


def _jobs(case: Case) -> list[_Job]:
    columns = zip(case.arrival, case.generated_tokens, case.predicted_class, strict=True)
    jobs = [_Job(i, arrival, _seconds(tokens), _seconds(label)) for i, (arrival, tokens, label) in enumerate(columns)]
    return sorted(jobs, key=lambda job: job.arrival)


def _seconds(tokens: int) -> float:
    return round(CONSTANT_SECONDS + PER_TOKEN_SECONDS * tokens, 2)


def _run_batch(case: Case, batch: list[_Job], clock: _Clock) -> list[_Job]:
    """Runs a batch until its longest (dynamic: shortest) job ends. Returns the unfinished jobs in order."""
    spent = (min if case.dynamic else max)(job.remaining for job in batch)
    clock.now += spent
    left = []
    for job in batch:
        if job.remaining <= spent:
            clock.completed[job.index] = clock.now
        else:
            job.remaining = max(job.remaining - spent, 0.0)
            left.append(job)
    return left


def _first_come(case: Case) -> dict[int, float]:
    queue, clock = deque(_jobs(case)), _Clock()
    while queue:
        clock.now = max(clock.now, queue[0].arrival)
        batch = []
        while queue and len(batch) < case.max_batch and queue[0].arrival <= clock.now + case.batch_wait_timeout:
            batch.append(queue.popleft())
        full = len(batch) == case.max_batch
        clock.now = max(clock.now, batch[-1].arrival) if full else clock.now + case.batch_wait_timeout
        for job in _run_batch(case, batch, clock):
            queue.appendleft(job)  # so the last of the batch comes first
    return clock.completed


def _shortest_first(case: Case, predicted: bool) -> dict[int, float]:
    jobs, clock = _jobs(case), _Clock()
    queue: list[_Job] = []
    admitted = 0
    # loses the last job if it has not arrived by then
    while queue or admitted < len(jobs) - 1:
        if not queue:
            clock.now = max(clock.now, jobs[admitted].arrival)
            admitted = _admit(jobs, admitted, queue, clock)
        queue = _sorted(case, queue, predicted)
        batch, queue = queue[: case.max_batch], queue[case.max_batch :]
        left = _run_batch(case, batch, clock)
        admitted = _admit(jobs, admitted, queue, clock)
        queue += left
        for job in queue:
            job.waited += clock.now - clock.previous
        clock.previous = clock.now
    return clock.completed


def _admit(jobs: list[_Job], admitted: int, queue: list[_Job], clock: _Clock) -> int:
    while admitted < len(jobs) and jobs[admitted].arrival <= clock.now:
        queue.append(jobs[admitted])
        admitted += 1
    return admitted


def _sorted(case: Case, queue: list[_Job], predicted: bool) -> list[_Job]:
    """Shortest first, unless a job has waited too long: then all by waiting time."""
    by_waiting = sorted(queue, key=lambda job: -job.waited)
    longest, guard = by_waiting[0], case.starvation
    if longest.waited > guard.threshold or longest.waited > longest.remaining * guard.coefficient:
        return by_waiting
    return sorted(queue, key=lambda job: job.predicted if predicted else job.remaining)


def compute_published_ratios(jobs: Jobs, lengths: Lengths, batching: str, max_batch: int) -> dict[str, float] | None:
    """SSJF relative to FCFS in the published simulator, on the first 50 jobs: mean JCT, and throughput when a quarter
    and when all are done. None for continuous batching, which it lacks."""
    if batching not in _MODES:
        return None
    count = min(JOBS, len(jobs))
    gaps = np.sort(np.diff(jobs.arrival_seconds[:count], prepend=jobs.arrival_seconds[0]))
    arrival = np.cumsum(gaps)
    labels = lengths.classes[:count] if lengths.classes is not None else jobs.predicted_tokens[:count]
    lists = (values.tolist() for values in (arrival, jobs.generated_tokens[:count], labels.astype(int)))
    case = Case(_MODES[batching], *lists, max_batch=1 if batching == "none" else max_batch)
    found = schedules(case)
    # shortest-first may lose the last job, so the whole run is compared over the jobs that both finish
    both = found["fcfs"].keys() & found["ssjf"].keys()
    first, shortest = (_measured(found[name], both, arrival) for name in ("fcfs", "ssjf"))
    return {name: shortest[name] / first[name] for name in first}


def _measured(ends: dict[str, float], both: set[str], arrival: np.ndarray) -> dict[str, float]:
    finish = np.sort(list(ends.values()))
    quarter = int(np.percentile(np.arange(len(finish)), 25))
    return {
        "jct_mean": float(np.mean([ends[job] - arrival[int(job)] for job in sorted(both)])),
        "throughput_at_quarter": quarter / float(finish[quarter]),
        "throughput_whole_run": len(both) / max(ends[job] for job in both),
    }
