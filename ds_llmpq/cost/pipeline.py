"""The engine's schedule played through in time: when each stage works, waits and hands on, and how long it all takes.

`simulate` follows what the engine does instruction by instruction: its prefill and decode schedules, receives posted
one micro-batch ahead, sends that block only when too many are under way, tokens returned by the last stage to all
others on their own channel, groups that drop out when all of their rows are done. Stage and link times go in, so any
cost model can be put behind it. Every message is known before it is needed, so the events can be computed in the order
of the passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES


class StageTimes(Protocol):
    """Seconds of the work and the messages of a pipeline; `rows` of the micro-batch, `tokens` new ones of each row."""

    stages: int

    def work(self, stage: int, phase: str, rows: int, tokens: int, past: int) -> float:
        """One pass of a micro-batch through a stage, with everything that stage does for it."""

    def hop(self, stage: int, phase: str, rows: int, tokens: int) -> float:
        """Hidden states from `stage` to the next one."""

    def back(self, stage: int, rows: int) -> float:
        """Tokens from the last stage to `stage`."""


@dataclass(frozen=True)
class UniformTimes:
    """Constant times, one list entry a stage: P_j and D_j; p_j and d_j from stage j to j + 1, the last one the way
    back (to every stage alike)."""

    prefill: Sequence[float]
    decode: Sequence[float]
    prefill_links: Sequence[float]
    decode_links: Sequence[float]

    @property
    def stages(self) -> int:
        return len(self.prefill)

    def work(self, stage: int, phase: str, rows: int, tokens: int, past: int) -> float:
        return (self.prefill if phase == "prefill" else self.decode)[stage]

    def hop(self, stage: int, phase: str, rows: int, tokens: int) -> float:
        return (self.prefill_links if phase == "prefill" else self.decode_links)[stage]

    def back(self, stage: int, rows: int) -> float:
        return self.decode_links[-1]


@dataclass(frozen=True)
class Span:
    """What a stage does from `start` for `seconds`, for rows [a, b): prefill, decode, wait_receive, wait_send or
    wait_tokens."""

    stage: int
    name: str
    start: float
    seconds: float
    rows: tuple[int, int]


@dataclass(frozen=True)
class Played:
    """prefill_seconds: until every row's first token is known on the first stage; decode_seconds: from there on."""

    prefill_seconds: float
    decode_seconds: float
    spans: tuple[Span, ...]

    @property
    def latency_seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    def busy_seconds(self, stage: int) -> float:
        return sum(span.seconds for span in self.spans if span.stage == stage and not span.name.startswith("wait_"))

    def chrome_events(self) -> list[dict]:
        """Complete events as in a run's trace.json: process = stage, microseconds."""
        return [
            {
                "name": span.name,
                "ph": "X",
                "pid": span.stage,
                "tid": 0,
                "ts": span.start * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"rows": list(span.rows)},
            }
            for span in self.spans
        ]


@dataclass
class _Clockwork:
    """Times known so far. A message is in one direction of one link at a time, and needs a posted receive."""

    times: StageTimes
    free: list[float] = field(default_factory=list)  # when each stage has done its last instruction
    link_free: list[float] = field(default_factory=list)
    back_free: list[float] = field(default_factory=list)
    sent: list[deque[float]] = field(default_factory=list)  # arrivals of a stage's last messages
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [0.0] * self.times.stages
        self.link_free = [0.0] * self.times.stages
        self.back_free = [0.0] * self.times.stages
        self.sent = [deque(maxlen=IN_FLIGHT_MESSAGES) for _ in range(self.times.stages)]

    def wait(self, stage: int, until: float, name: str, rows: tuple[int, int]) -> None:
        if until > self.free[stage]:
            self.spans.append(Span(stage, name, self.free[stage], until - self.free[stage], rows))
            self.free[stage] = until

    def run(self, stage: int, phase: str, rows: tuple[int, int], tokens: int, past: int) -> None:
        seconds = self.times.work(stage, phase, rows[1] - rows[0], tokens, past)
        self.spans.append(Span(stage, phase, self.free[stage], seconds, rows))
        self.free[stage] += seconds

    def send(self, stage: int, phase: str, rows: tuple[int, int], tokens: int, posted: float) -> float:
        """When a message that `stage` now hands over is there; `posted`: when the next stage posted for it."""
        if len(self.sent[stage]) == IN_FLIGHT_MESSAGES:
            self.wait(stage, self.sent[stage][0], "wait_send", rows)
        start = max(self.free[stage], posted, self.link_free[stage])
        self.link_free[stage] = start + self.times.hop(stage, phase, rows[1] - rows[0], tokens)
        self.sent[stage].append(self.link_free[stage])
        return self.link_free[stage]

    def send_back(self, rows: tuple[int, int]) -> list[float]:
        """When the tokens just chosen are known on each stage; the last one knows them at once."""
        last = self.times.stages - 1
        known = []
        for stage in range(last):
            start = max(self.free[last], self.back_free[stage])
            self.back_free[stage] = start + self.times.back(stage, rows[1] - rows[0])
            known.append(self.back_free[stage])
        return [*known, self.free[last]]


def simulate(
    times: StageTimes,
    prompts: Sequence[int],
    generated: Sequence[int],
    prefill: Sequence[tuple[int, int]],
    decode: Sequence[tuple[int, int]],
) -> Played:
    """Plays a wave: `prompts` and `generated` tokens of each row; `prefill` micro-batches and `decode` groups as rows
    [start, stop). A row's first token comes from prefill."""
    clock = _Clockwork(times)
    known = _play_prefill(clock, prompts, prefill)
    prefilled = max(known[0])
    _play_decode(clock, prompts, generated, decode, known)
    # the engine notes the end on the first stage: its own last instruction, or the last tokens it hears of
    end = max(clock.free[0], *known[0])
    return Played(prefilled, end - prefilled, tuple(clock.spans))


def _play_prefill(clock: _Clockwork, prompts: Sequence[int], batches: Sequence[tuple[int, int]]) -> list[list[float]]:
    """When each row's first token is known, by stage and row."""
    stages = clock.times.stages
    known = [[0.0] * len(prompts) for _ in range(stages)]
    posted = [0.0] * stages  # for the micro-batch at hand: when this stage took the one before
    for rows in batches:
        tokens = max(prompts[rows[0] : rows[1]])
        arrived = 0.0
        for stage in range(stages):
            if stage:
                clock.wait(stage, arrived, "wait_receive", rows)
                posted[stage] = clock.free[stage]
            clock.run(stage, "prefill", rows, tokens, 0)
            if stage + 1 < stages:
                arrived = clock.send(stage, "prefill", rows, tokens, posted[stage + 1])
        _note(known, rows, clock.send_back(rows))
    return known


def _play_decode(
    clock: _Clockwork,
    prompts: Sequence[int],
    generated: Sequence[int],
    groups: Sequence[tuple[int, int]],
    known: list[list[float]],
) -> None:
    stages = clock.times.stages
    # posting ahead happens when the previous group is taken, if this one's tokens are known by then
    ahead: list[dict[tuple[int, int], float]] = [{} for _ in range(stages)]
    done = 1  # tokens of every row that is still running
    going = list(groups)
    while going:
        for rows in list(going):
            for stage in range(stages):
                clock.wait(stage, max(known[stage][rows[0] : rows[1]]), "wait_tokens", rows)
            if max(generated[rows[0] : rows[1]]) <= done:
                going.remove(rows)
                continue
            _play_group(clock, rows, going, prompts, generated, done, known, ahead)
        done += 1


def _play_group(
    clock: _Clockwork,
    rows: tuple[int, int],
    going: list[tuple[int, int]],
    prompts: Sequence[int],
    generated: Sequence[int],
    done: int,
    known: list[list[float]],
    ahead: list[dict[tuple[int, int], float]],
) -> None:
    """One group's pass through all stages."""
    stages = clock.times.stages
    index = going.index(rows)
    following = going[(index + 1) % len(going)]
    tokens_of_following = done + (index + 1 == len(going))
    arrived = 0.0
    for stage in range(stages):
        if stage:
            clock.wait(stage, arrived, "wait_receive", rows)
            goes_on = max(generated[following[0] : following[1]]) > tokens_of_following
            if following != rows and goes_on and max(known[stage][following[0] : following[1]]) <= clock.free[stage]:
                ahead[stage][following] = clock.free[stage]
        # a finished row goes along where it ended
        past = max(prompts[row] + min(done, generated[row]) - 1 for row in range(*rows))
        posted_from = clock.free[stage + 1] if stage + 1 < stages else 0.0
        clock.run(stage, "decode", rows, 1, past)
        if stage + 1 < stages:
            posted = ahead[stage + 1].pop(rows, posted_from)
            arrived = clock.send(stage, "decode", rows, 1, posted)
    _note(known, rows, clock.send_back(rows))


def _note(known: list[list[float]], rows: tuple[int, int], times: list[float]) -> None:
    for stage, when in enumerate(times):
        for row in range(*rows):
            known[stage][row] = when
