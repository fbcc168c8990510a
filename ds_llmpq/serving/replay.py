"""Replays a trace on the real pipeline: requests arrive at their times, a policy picks the next, waiting is
measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.plan import Plan
from ds_llmpq.scheduler.execution import PlanCost
from ds_llmpq.scheduler.jobs import Jobs
from ds_llmpq.scheduler.policies import Guard, make_queue
from ds_llmpq.scheduler.request_group import RequestGroup

_LONGEST_SLEEP_SECONDS = 0.5


@dataclass
class Replay:
    """Hands out requests as they arrive. Its clock starts when the first group is asked for. Every slot has room for
    the worst case, so no answer outgrows its slot.

    `shape`: (slots, capacity) that fit every request. `room()`: slots of the engine that are free now, None between
    streams. `alive()` is called while nothing happens. `begun`: tokens that requests have already generated, by index.
    """

    prepared: Sequence[PreparedRequest]
    shape: tuple[int, int]
    plan: Plan
    policy: str
    expected_tokens: Sequence[float]
    room: Callable[[], int | None]
    alive: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    begun: Mapping[int, Sequence[int]] = field(default_factory=dict)
    stopped: bool = False
    _started: float | None = None
    _began: dict[int, float] = field(default_factory=dict)
    _ended: dict[int, float] = field(default_factory=dict)
    _come: int = 0

    def __post_init__(self) -> None:
        # jobs are numbered by arrival; `_index` names the request of each
        arrivals = np.array([each.request.arrival_seconds for each in self.prepared])
        self._index = np.argsort(arrivals, kind="stable").tolist()
        self._arrival = arrivals.tolist()
        prompts = np.array([each.prompt_tokens for each in self.prepared])
        limits = np.array([each.max_tokens for each in self.prepared])
        if len(arrivals):
            jobs = Jobs.from_arrays(arrivals, limits, prompts, np.array(self.expected_tokens))
            self._queue = make_queue(self.policy, jobs, PlanCost.from_plan(self.plan), Guard())

    def take(self) -> RequestGroup | None:
        """The requests to run next, at most as many as free slots. An empty group: none has arrived; None: the end."""
        now = self._now()
        self._arrive(now)
        room = self.room()
        while not self.stopped and not self._waiting() and self._come < len(self._index):
            if room is not None:
                return RequestGroup((), *self.shape, joins=True, live=True)
            self._sleep_until(self._arrival[self._index[self._come]])
            now = self._now()
            self._arrive(now)
        if self.stopped or not self._waiting():
            return None
        rows = []
        while self._waiting() and len(rows) < (self.shape[0] if room is None else max(1, room)):
            index = self._index[self._queue.pop(now)]
            self._began.setdefault(index, now)
            rows.append(self.prepared[index].sequence(index, self.begun.get(index, ())))
        return RequestGroup(tuple(rows), *self.shape, joins=True, live=True)

    def end(self, key: int) -> None:
        """The request's last token is known."""
        self._ended[key] = self._now()

    def stop(self) -> None:
        self.stopped = True

    def report(self) -> dict[str, Any]:
        """Job completion times, from a request's arrival to its last token, and waiting, from arrival to admission."""
        jct = sorted(self._ended[key] - self._arrival[key] for key in self._ended)
        if not jct:
            return {"policy": self.policy, "jobs": 0}
        waiting = [self._began[key] - self._arrival[key] for key in self._ended]
        return {
            "policy": self.policy,
            "jobs": len(jct),
            "jct_seconds": {"mean": mean(jct)} | {f"p{q}": float(np.quantile(jct, q / 100)) for q in (50, 90, 99)},
            "waiting_seconds": {"mean": mean(waiting), "max": max(waiting)},
            "makespan_seconds": max(self._ended.values()),
            "source": "measured",
        }

    def _waiting(self) -> int:
        return len(self._queue) if self._index else 0

    def _now(self) -> float:
        if self._started is None:
            self._started = self.clock()
        return self.clock() - self._started

    def _arrive(self, now: float) -> None:
        while self._come < len(self._index) and self._arrival[self._index[self._come]] <= now:
            self._queue.push(self._come)
            self._come += 1

    def _sleep_until(self, when: float) -> None:
        while not self.stopped and (left := when - self._now()) > 0:
            self.sleep(min(left, _LONGEST_SLEEP_SECONDS))
            self.alive()
