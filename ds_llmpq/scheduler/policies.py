"""Waiting jobs and who is next: policies as priority keys, and a starvation guard over what a scheduler can see."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.scheduler.execution import ExecutionCost, estimate_alone
from ds_llmpq.scheduler.jobs import Jobs

GUARDS = ("none", "aging", "overdue")
POLICIES = ("fcfs", "sjf", "ssjf", "longest_first", "prompt_length")
# policies that need the predictor and so pay for it
PREDICTING = frozenset({"ssjf", "longest_first"})


@dataclass(frozen=True)
class Guard:
    """Keeps long jobs from starving, with what a scheduler can see: waiting time and estimated run time.

    A job's limit is the smaller of `threshold_seconds` and `coefficient` times its estimated run time (None: no such
    bound). `aging`: jobs go by arrival + limit, so none is overtaken by one that came more than its limit later.
    `overdue`: a job that has waited longer than its limit goes before all that have not, oldest first; under
    overload that is first come, first served. `none`: no guard.
    """

    kind: str = "aging"
    threshold_seconds: float | None = 300.0
    coefficient: float | None = 30.0

    def __post_init__(self) -> None:
        if self.kind not in GUARDS:
            raise UserError(f"guard.kind is {self.kind!r} but must be one of {', '.join(GUARDS)}.")
        for name in ("threshold_seconds", "coefficient"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"guard.{name} is {value} but must be above 0, or null for no such bound.")
        if self.kind == "aging" and self.coefficient is None:
            raise UserError("guard.kind=aging needs guard.coefficient, or all jobs would age alike; give one.")

    def limit(self, estimated_seconds: float) -> float:
        bound = math.inf if self.threshold_seconds is None else self.threshold_seconds
        return bound if self.coefficient is None else min(bound, self.coefficient * estimated_seconds)


NO_GUARD = Guard("none")


def make_queue(policy: str, jobs: Jobs, cost: ExecutionCost, guard: Guard) -> Queue | GroupQueue:
    """The queue of a policy. `UserError`: no such policy.

    `fcfs` by arrival; `sjf` by true remaining length (an oracle); `ssjf` by predicted remaining length;
    `longest_first` by predicted remaining length, longest first; `prompt_length` groups jobs of like prompts.
    """
    if policy not in POLICIES:
        raise UserError(f"policy is {policy!r} but must be one of {', '.join(POLICIES)}.")
    if policy == "prompt_length":
        return GroupQueue(jobs)
    if policy == "fcfs":
        return Queue(np.zeros(len(jobs)), 0, jobs, cost, NO_GUARD)
    estimated = jobs.generated_tokens if policy == "sjf" else jobs.predicted_tokens
    if policy == "longest_first":  # aging would make long jobs wait
        overdue = replace(guard, kind="overdue") if guard.kind == "aging" else guard
        return Queue(estimated, -1, jobs, cost, overdue)
    return Queue(estimated, 1, jobs, cost, guard)


class Queue:
    """Jobs by priority. Ties go to the job that came first.

    `estimated_tokens`: estimated length by job. `sign`: 1 smallest remaining first, -1 largest, 0
    all alike.
    """

    def __init__(self, estimated_tokens: np.ndarray, sign: int, jobs: Jobs, cost: ExecutionCost, guard: Guard):
        self._estimated = estimated_tokens.tolist()
        self._sign = sign
        self._guard = guard
        self._cost = cost
        self._prompts = jobs.prompt_tokens.tolist()
        self._arrival = jobs.arrival_seconds.tolist()
        self._stint = [0] * len(jobs)  # odd while a job waits; entries of earlier stints are stale
        self._by_key: list[tuple[float, int, int]] = []
        self._by_deadline: list[tuple[float, int, int]] = []
        self._overdue: list[tuple[int, int]] = []
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, job: int, done_tokens: float = 0.0, served_seconds: float = 0.0) -> None:
        """`done_tokens`, `served_seconds`: what the job got before it was sent back."""
        self._stint[job] += 1
        self._waiting += 1
        stint = self._stint[job]
        left = self._estimate_left(job, done_tokens)
        came = self._arrival[job] + served_seconds
        if self._guard.kind == "aging":
            key = came + self._guard.limit(estimate_alone(self._cost, self._prompts[job], left))
        else:
            key = self._sign * left
        heapq.heappush(self._by_key, (key, job, stint))
        if self._guard.kind == "overdue":
            estimated = estimate_alone(self._cost, self._prompts[job], self._estimated[job])
            heapq.heappush(self._by_deadline, (came + self._guard.limit(estimated), job, stint))

    def pop(self, now: float) -> int:
        """The next job to run."""
        while self._by_deadline and self._by_deadline[0][0] < now:
            _, job, stint = heapq.heappop(self._by_deadline)
            if self._stint[job] == stint:
                heapq.heappush(self._overdue, (job, stint))
        job = self._pop_fresh(self._overdue)
        if job is None:
            job = self._pop_fresh(self._by_key)
        self._stint[job] += 1
        self._waiting -= 1
        return job

    def _estimate_left(self, job: int, done: float) -> float:
        """Estimated remaining tokens; a job that outran its prediction is expected to go on for as long as it ran."""
        left = self._estimated[job] - done
        return left if left > 0 or not done else done

    def _pop_fresh(self, heap: list) -> int | None:
        """Removes and returns the first job of a heap that is not stale."""
        while heap:
            *_, job, stint = heapq.heappop(heap)
            if self._stint[job] == stint:
                return job
        return None


class GroupQueue:
    """Jobs in groups of like prompt length (powers of two); the job that waited longest names the group to run."""

    def __init__(self, jobs: Jobs):
        self._group = [int(tokens).bit_length() for tokens in jobs.prompt_tokens]
        self._returned: list[int] = []  # jobs sent back go before all, by arrival: nobody may starve
        self._groups: dict[int, deque[int]] = {}
        self._current: tuple[float, int] | None = None
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, job: int, done_tokens: float = 0.0, served_seconds: float = 0.0) -> None:
        self._waiting += 1
        if done_tokens:
            heapq.heappush(self._returned, job)
        else:
            self._groups.setdefault(self._group[job], deque()).append(job)

    def pop(self, now: float) -> int:
        """Pops at one time fill from one group, then from the group whose head is the oldest."""
        self._waiting -= 1
        if self._returned:
            return heapq.heappop(self._returned)
        if self._current is None or self._current[0] != now or not self._groups[self._current[1]]:
            oldest = min((queue[0], group) for group, queue in self._groups.items() if queue)
            self._current = (now, oldest[1])
        return self._groups[self._current[1]].popleft()
