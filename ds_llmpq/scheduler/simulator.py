"""The engine's micro-batches simulated in time: when each stage works, waits and sends, and how long it all takes.

`simulate` follows what the engine does instruction by instruction: the micro-batches of `scheduler.scheduler`, the next
receive posted as soon as it is certain, sends that block only when too many are under way, tokens returned by the last
stage to all others on their own channel, slots refilled as sequences end. Stage and link times go in, so any cost model
can be put behind it. Every message is known before it is needed, so events can be computed batch by batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits, take_call
from ds_llmpq.scheduler.scheduler import Scheduler


class CallPart(NamedTuple):
    """A micro-batch by its size: `tokens` new ones of each row, behind `past`."""

    phase: str
    rows: int
    tokens: int
    past: int


class StageTimes(Protocol):
    """Seconds of the work and the messages of a pipeline; `rows` of the micro-batch, `tokens` new ones of each row."""

    stages: int

    def work(self, stage: int, phase: str, rows: int, tokens: int, past: int) -> float:
        """A micro-batch through a stage, with everything that stage does for it."""

    def work_joined(self, stage: int, parts: Sequence[CallPart]) -> float:
        """Several micro-batches through a stage in one call, as stages that are graphs run them."""

    def hop(self, stage: int, phase: str, rows: int, tokens: int) -> float:
        """Hidden states from `stage` to the next one."""

    def back(self, stage: int, rows: int) -> float:
        """Tokens from the last stage to `stage`."""


@dataclass(frozen=True)
class Span:
    """What a stage does from `start` for `seconds`, about so many rows: prefill, decode, wait_receive, wait_send or
    wait_tokens."""

    stage: int
    name: str
    start: float
    seconds: float
    rows: int


@dataclass(frozen=True)
class SimulatedRun:
    """latency_seconds: until the first stage knows the last token. first_tokens_seconds: until it knows the first token
    of every sequence that was admitted at the start. last_token_seconds: of each sequence."""

    latency_seconds: float
    first_tokens_seconds: float
    last_token_seconds: tuple[float, ...]
    spans: tuple[Span, ...]

    def busy_seconds(self, stage: int, phase: str | None = None) -> float:
        """Work of a stage in all, or in one phase."""
        return sum(
            span.seconds
            for span in self.spans
            if span.stage == stage and (span.name == phase if phase else not span.name.startswith("wait_"))
        )

    def count_passes(self, stage: int, phase: str) -> int:
        return sum(span.stage == stage and span.name == phase for span in self.spans)

    def build_chrome_events(self, start: float = 0.0) -> list[dict]:
        """Complete events as in a run's trace.json: process = stage, microseconds, counted from `start` seconds."""
        return [
            {
                "name": span.name,
                "ph": "X",
                "pid": span.stage,
                "tid": 0,
                "ts": (start + span.start) * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"rows": span.rows},
            }
            for span in self.spans
        ]


@dataclass
class _StageClock:
    """Times known so far. A message is in one direction of one link at a time, and needs a posted receive."""

    times: StageTimes
    free: list[float] = field(default_factory=list)  # when each stage has done its last instruction
    took: list[float] = field(default_factory=list)  # when each stage took the hidden states of its last micro-batch
    link_free: list[float] = field(default_factory=list)
    back_free: list[float] = field(default_factory=list)
    sent: list[deque[float]] = field(default_factory=list)  # arrivals of a stage's last messages
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [0.0] * self.times.stages
        self.took = [0.0] * self.times.stages
        self.link_free = [0.0] * self.times.stages
        self.back_free = [0.0] * self.times.stages
        self.sent = [deque(maxlen=IN_FLIGHT_MESSAGES) for _ in range(self.times.stages)]

    def wait(self, stage: int, until: float, name: str, rows: int) -> None:
        if until > self.free[stage]:
            self.spans.append(Span(stage, name, self.free[stage], until - self.free[stage], rows))
            self.free[stage] = until

    def run(self, stage: int, parts: Sequence[CallPart]) -> None:
        """A call's time is shared out by tokens, as in a run's trace."""
        one = len(parts) == 1
        seconds = self.times.work(stage, *parts[0]) if one else self.times.work_joined(stage, parts)
        tokens = sum(part.rows * part.tokens for part in parts)
        for part in parts:
            own = seconds if one else seconds * part.rows * part.tokens / tokens
            self.spans.append(Span(stage, part.phase, self.free[stage], own, part.rows))
            self.free[stage] += own

    def send(self, stage: int, phase: str, rows: int, tokens: int, posted: float) -> float:
        """When a message that `stage` now hands over is there; `posted`: when the next stage posted for it."""
        if len(self.sent[stage]) == IN_FLIGHT_MESSAGES:
            self.wait(stage, self.sent[stage][0], "wait_send", rows)
        start = max(self.free[stage], posted, self.link_free[stage])
        self.link_free[stage] = start + self.times.hop(stage, phase, rows, tokens)
        self.sent[stage].append(self.link_free[stage])
        return self.link_free[stage]

    def send_back(self, rows: int) -> list[float]:
        """When the tokens just chosen are known on each stage; the last one knows them at once."""
        last = self.times.stages - 1
        known = []
        for stage in range(last):
            start = max(self.free[last], self.back_free[stage])
            self.back_free[stage] = start + self.times.back(stage, rows)
            known.append(self.back_free[stage])
        return [*known, self.free[last]]


def simulate(
    times: StageTimes,
    lengths: Sequence[tuple[int, int]],
    slots: int,
    limits: MicroBatchLimits,
    shared_tokens: Sequence[int] = (),
    most_tokens: Sequence[int] = (),
) -> SimulatedRun:
    """One stream; `lengths` are (prompt tokens, generated tokens) of each sequence, in the order of admission, and
    `shared_tokens` how many of each prompt's are a prefix that is there already; (): none of any. `most_tokens`: how
    many each might have come to, which says how many are admitted where they share cache blocks."""
    return _Simulation(times, lengths, slots, limits, shared_tokens, most_tokens).run()


class _Simulation:
    """One simulated stream: what is in each slot, and when each stage knows of it."""

    def __init__(
        self,
        times: StageTimes,
        lengths: Sequence[tuple[int, int]],
        slots: int,
        limits: MicroBatchLimits,
        shared_tokens: Sequence[int],
        most_tokens: Sequence[int],
    ):
        self.clock = _StageClock(times)
        self.lengths = lengths
        self.limits = limits
        self.scheduler = Scheduler(slots, limits)
        self.scheduler.add((prompt for prompt, _ in lengths), shared_tokens, most_tokens)
        self.sequence = [0] * slots
        self.tokens = [0] * len(lengths)  # generated so far
        self.known = [[0.0] * slots for _ in range(times.stages)]
        self.last_token = [0.0] * len(lengths)
        self.first_tokens = 0.0

    def run(self) -> SimulatedRun:
        stages = range(self.clock.times.stages)
        certain = [True] * len(stages)  # whether a stage knew its next micro-batch when it took the last one
        while self.scheduler.next_group() is not None:
            slots = self.scheduler.list_pending_slots()
            for stage in stages:
                known = max((self.known[stage][slot] for slot in slots), default=0.0)
                certain[stage] = certain[stage] and known <= self.clock.took[stage]
                self.clock.wait(stage, known, "wait_tokens", len(slots))
            admitted_before = self.scheduler.waiting < len(self.lengths)
            batches = deque(self.scheduler.schedule(self._has_ended))
            while batches:
                call = take_call(batches)
                self._run_call(call, certain)
                certain = [True] * len(stages)
                if not admitted_before:
                    known = (self.known[0][slot] for batch in call if batch.phase == "prefill" for slot in batch.live)
                    self.first_tokens = max(self.first_tokens, *known, 0.0)
        latency = max(self.known[0], default=0.0)
        return SimulatedRun(latency, self.first_tokens, tuple(self.last_token), tuple(self.clock.spans))

    def _has_ended(self, slot: int) -> bool:
        return self.tokens[self.sequence[slot]] >= self.lengths[self.sequence[slot]][1]

    def _measure(self, batch: MicroBatch) -> CallPart:
        """Its size, once its sequences have taken their slots."""
        for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
            self.sequence[slot] = sequence
        # a preempted sequence's tokens are computed again
        there = [self.lengths[self.sequence[slot]][0] + self.tokens[self.sequence[slot]] for slot in batch.slots]
        if batch.phase == "prefill":
            # a graph's rows are not padded: their mean counts
            longest = -(-sum(there) // batch.size) if self.limits.ragged else max(there)
            return CallPart(batch.phase, batch.size, batch.tokens or longest - batch.past, batch.past)
        live = set(batch.live)
        past = max(count for slot, count in zip(batch.slots, there, strict=True) if slot in live) - 1
        return CallPart(batch.phase, self.limits.count_rows(batch, len(self.sequence)), 1, past)

    def _run_call(self, batches: Sequence[MicroBatch], certain: Sequence[bool]) -> None:
        """Micro-batches of one call, mostly one alone, through all stages; where it was `certain`, its receive was
        posted with the one before."""
        clock, parts = self.clock, [self._measure(batch) for batch in batches]
        rows = sum(batch.size for batch in batches)
        stages = clock.times.stages
        posted = [clock.took[stage] if certain[stage] else clock.free[stage] for stage in range(stages)]
        arrived = 0.0
        for stage in range(stages):
            if stage:
                clock.wait(stage, arrived, "wait_receive", rows)
            clock.took[stage] = clock.free[stage]
            clock.run(stage, parts)
            for batch, part in zip(batches, parts, strict=True) if stage + 1 < stages else ():
                arrived = clock.send(stage, part.phase, batch.size, part.tokens, posted[stage + 1])
        for batch in batches:
            if batch.live:  # a chunk of a prompt has no token
                self._note_tokens(batch)

    def _note_tokens(self, batch: MicroBatch) -> None:
        for stage, when in enumerate(self.clock.send_back(batch.size)):
            for slot in batch.live:
                self.known[stage][slot] = when
        for slot in batch.live:
            self.tokens[self.sequence[slot]] += 1
            self.last_token[self.sequence[slot]] = self.known[0][slot]
