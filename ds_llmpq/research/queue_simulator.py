"""Discrete-event simulation of one server that runs up to `max_batch` jobs at a time.

    none        one job at a time
    static      a batch runs until its longest job ends; all are answered then
    dynamic     a batch runs until its shortest job ends; the others join those waiting for the next batch
    continuous  a slot whose job ends is refilled before the next iteration (one token for every row)

Time is in seconds. All policies wait equally for partial batches, and none loses a job.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.scheduler.execution import ExecutionCost
from ds_llmpq.scheduler.jobs import Jobs
from ds_llmpq.scheduler.policies import PREDICTING, Guard, make_queue

BATCHINGS = ("none", "static", "dynamic", "continuous")
_NO_WORK = 1e-9  # steps; less than this is a rounding error


@dataclass(frozen=True)
class Server:
    """How jobs are batched. `batch_wait_seconds`: how long a partial batch (static, dynamic) waits to fill."""

    batching: str = "none"
    max_batch: int = 1
    batch_wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.batching not in BATCHINGS:
            raise UserError(f"batching is {self.batching!r} but must be one of {', '.join(BATCHINGS)}.")
        if self.max_batch < 1 or not self.batch_wait_seconds >= 0:
            raise UserError(
                f"max_batch is {self.max_batch} and batch_wait_seconds is {self.batch_wait_seconds}, but they must be "
                "at least 1 and 0."
            )


@dataclass(frozen=True)
class Schedule:
    """What happened. Arrays are by job, in the order of `Jobs`; slots count computed positions, padding included."""

    start_seconds: np.ndarray  # first time in a batch
    completion_seconds: np.ndarray
    prompt_slots: int
    generated_slots: int
    busy_seconds: float


def simulate(
    jobs: Jobs,
    cost: ExecutionCost,
    policy: str = "fcfs",
    server: Server = Server(),
    guard: Guard = Guard(),  # noqa: B008 (frozen)
    prediction_seconds: float = 0.0,
) -> Schedule:
    """Runs all jobs under a policy. A policy that predicts may schedule a job only after its prediction, which takes
    `prediction_seconds`, one job after another. `UserError`: unknown policy or batching."""
    if not prediction_seconds >= 0:
        raise UserError(f"prediction.latency_seconds is {prediction_seconds} but must not be negative.")
    run = _QueueRun(jobs, cost, policy, server, guard, prediction_seconds if policy in PREDICTING else 0.0)
    if server.batching == "continuous":
        _run_continuous(run)
    else:
        _run_batches(run)
    start, end = np.array(run.start), np.array(run.end)
    return Schedule(start, end, run.prompt_slots, run.generated_slots, run.busy_seconds)


def compute_ready_seconds(arrival_seconds: np.ndarray, prediction_seconds: float) -> np.ndarray:
    """When each prediction is ready: one predictor serves jobs as they arrive, `prediction_seconds` each."""
    offset = prediction_seconds * np.arange(len(arrival_seconds))
    return np.maximum.accumulate(arrival_seconds - offset) + offset + prediction_seconds


@dataclass
class _QueueRun:
    """State of a simulation: clock, queue, arrivals, and time spent."""

    jobs: Jobs
    cost: ExecutionCost
    policy: str
    server: Server
    guard: Guard
    prediction_seconds: float
    now: float = 0.0
    next: int = 0  # first job that is not yet ready
    busy_seconds: float = 0.0
    prompt_slots: int = 0
    generated_slots: int = 0
    start: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = make_queue(self.policy, self.jobs, self.cost, self.guard)
        self.ready = compute_ready_seconds(self.jobs.arrival_seconds, self.prediction_seconds).tolist()
        self.prompts = self.jobs.prompt_tokens.tolist()
        self.work = [
            self.cost.own_steps(prompt) + tokens
            for prompt, tokens in zip(self.prompts, self.jobs.generated_tokens.tolist(), strict=True)
        ]
        self.start = [math.nan] * len(self.jobs)
        self.end = [math.nan] * len(self.jobs)

    def admit(self) -> None:
        while self.next < len(self.ready) and self.ready[self.next] <= self.now:
            self.queue.push(self.next)
            self.next += 1

    def wait_for_work(self) -> bool:
        """Advances the clock until a job waits; False if none will come."""
        self.admit()
        if not self.queue and self.next < len(self.ready):
            self.now = self.ready[self.next]
            self.admit()
        return bool(self.queue)

    def begin(self, new: list[int]) -> None:
        """Starts jobs for the first time; their prompts are padded to the longest of them."""
        for job in new:
            self.start[job] = self.now
        prompts = [self.prompts[job] for job in new]
        self.prompt_slots += len(new) * max(prompts)
        self.spend(self.cost.stall_seconds(prompts))

    def spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy_seconds += seconds


def _run_batches(run: _QueueRun) -> None:
    """No, static and dynamic batching."""
    dynamic = run.server.batching == "dynamic"
    rows = 1 if run.server.batching == "none" else run.server.max_batch
    done = [0.0] * len(run.jobs)
    served = [0.0] * len(run.jobs)
    while run.wait_for_work():
        _wait_to_fill(run, rows)
        batch = [run.queue.pop(run.now) for _ in range(min(rows, len(run.queue)))]
        began = run.now
        new = [job for job in batch if done[job] == 0.0]
        if new:
            run.begin(new)
        steps = (min if dynamic else max)(run.work[job] - done[job] for job in batch)
        context = sum(run.prompts[job] + int(done[job]) for job in batch)
        run.spend(run.cost.decode_seconds(len(batch), context, steps))
        run.admit()
        for job in batch:
            done[job] += steps
            served[job] += run.now - began
            if run.work[job] - done[job] <= _NO_WORK:
                run.end[job] = run.now
            else:
                run.queue.push(job, done[job], served[job])
        if not dynamic:
            run.generated_slots += len(batch) * int(run.jobs.generated_tokens[batch].max())
    if dynamic:  # a dynamic batch computes nothing in vain
        run.generated_slots = int(run.jobs.generated_tokens.sum())


def _wait_to_fill(run: _QueueRun, rows: int) -> None:
    missing = rows - len(run.queue)
    if missing <= 0 or run.server.batch_wait_seconds == 0:
        return
    last = run.next + missing - 1
    full_at = run.ready[last] if last < len(run.ready) else math.inf
    run.now = min(full_at, run.now + run.server.batch_wait_seconds)
    run.admit()


def _run_continuous(run: _QueueRun) -> None:
    """Refills slots between iterations. The clock jumps to the next iteration at which a job ends or, with a free slot,
    to the first one after the next arrival."""
    active: list[tuple[int, int]] = []  # (iteration at which a job ends, job)
    step, context = 0, 0
    while active or run.wait_for_work():
        run.admit()
        while run.queue and len(active) < run.server.max_batch:
            new = [run.queue.pop(run.now) for _ in range(min(len(run.queue), run.server.max_batch - len(active)))]
            run.begin(new)
            for job in new:
                heapq.heappush(active, (step + math.ceil(run.work[job]), job))
                context += run.prompts[job]
            run.admit()  # those that arrived meanwhile
        steps = active[0][0] - step
        if len(active) < run.server.max_batch and run.next < len(run.ready):
            steps = _steps_until(run, len(active), context, run.ready[run.next], steps)
        run.spend(run.cost.decode_seconds(len(active), context, steps))
        step += steps
        context += steps * len(active)
        while active and active[0][0] == step:
            _, job = heapq.heappop(active)
            run.end[job] = run.now
            context -= run.prompts[job] + math.ceil(run.work[job])
    run.generated_slots = int(run.jobs.generated_tokens.sum())


def _steps_until(run: _QueueRun, rows: int, context: int, when: float, most: int) -> int:
    """The fewest steps, from 1 to `most`, after which the clock has reached `when`."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if run.now + run.cost.decode_seconds(rows, context, middle) >= when:
            high = middle
        else:
            low = middle + 1
    return low


def measure_schedule(jobs: Jobs, schedule: Schedule) -> dict[str, float]:
    """Job completion time (JCT) and waiting in seconds, throughput over the makespan, padding.

    Waiting is until a job's first start. The makespan runs from the first arrival to the last completion.
    `padded_token_share` counts prompt and answer positions. `throughput_at_quarter_jobs_per_second` is what the
    published evaluation reported: jobs per second when a quarter of them is done, counted from time zero.
    """
    jct = schedule.completion_seconds - jobs.arrival_seconds
    waiting = schedule.start_seconds - jobs.arrival_seconds
    makespan = float(schedule.completion_seconds.max() - jobs.arrival_seconds[0])
    tokens, prompts = int(jobs.generated_tokens.sum()), int(jobs.prompt_tokens.sum())
    slots = schedule.generated_slots + schedule.prompt_slots
    quarter = int(np.percentile(np.arange(len(jobs)), 25))
    return {
        "jobs": len(jobs),
        "jct_mean_seconds": float(jct.mean()),
        "jct_p50_seconds": float(np.percentile(jct, 50)),
        "jct_p99_seconds": float(np.percentile(jct, 99)),
        "waiting_mean_seconds": float(waiting.mean()),
        "waiting_p99_seconds": float(np.percentile(waiting, 99)),
        "waiting_max_seconds": float(waiting.max()),
        "makespan_seconds": makespan,
        "throughput_jobs_per_second": len(jobs) / makespan,
        "throughput_tokens_per_second": tokens / makespan,
        "busy_share": schedule.busy_seconds / makespan,
        "padded_token_share": 1 - (tokens + prompts) / slots,
        "padded_generated_share": 1 - tokens / schedule.generated_slots,
        "throughput_at_quarter_jobs_per_second": quarter / float(np.sort(schedule.completion_seconds)[quarter]),
    }
