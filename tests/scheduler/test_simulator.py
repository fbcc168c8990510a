"""The simulated schedule against a step-by-step reference with processes of its own, and against the plan's formula."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.scheduler import Scheduler
from ds_llmpq.scheduler.simulator import simulate


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


SECONDS = st.floats(0.001, 1.0)


class VariedTimes:
    """Times that differ by stage, phase, rows and length."""

    def __init__(self, stages, seed):
        generator = random.Random(seed)
        self.stages = stages
        self.base = [generator.uniform(0.1, 1.0) for _ in range(stages)]
        self.link = [generator.uniform(0.0, 0.5) for _ in range(stages)]
        self.way_back = [generator.uniform(0.0, 0.5) for _ in range(stages)]

    def work(self, stage, phase, rows, tokens, past):
        return self.base[stage] * (1 + 0.1 * rows + 0.01 * tokens + 0.003 * past)

    def hop(self, stage, phase, rows, tokens):
        return self.link[stage] * (1 + 0.2 * rows * tokens)

    def back(self, stage, rows):
        return self.way_back[stage] * (1 + 0.1 * rows)


class Reference:
    """Stages as generators that ask for messages and time; a heap wakes them. Nothing is shared with `simulate`.

    A stage yields ("sleep", seconds) or ("until", condition) and is resumed when the condition holds.
    """

    def __init__(self, times, lengths, slots, sizes):
        self.times, self.lengths, self.slots, self.sizes = times, lengths, slots, sizes
        self.now, self.heap, self.count = 0.0, [], 0
        stages = range(times.stages)
        self.known = [[0] * slots for _ in stages]  # tokens that a stage has heard of, by slot, over all its sequences
        self.posted = [set() for _ in stages]
        self.outbox = [deque() for _ in stages]  # (key, seconds) that stage j has handed over
        self.busy_link = [False] * times.stages
        self.arrived = [set() for _ in stages]
        self.under_way = [0] * times.stages
        self.back_queue = [deque() for _ in stages]
        self.busy_back = [False] * times.stages
        self.ended = 0.0

    def at(self, delay, action):
        self.count += 1
        heapq.heappush(self.heap, (self.now + delay, self.count, action))

    def run(self):
        waiting = []
        processes = [self.stage(j) for j in range(self.times.stages)]
        runnable = deque(processes)
        while True:
            progress = True
            while progress:
                progress = False
                self.pump()
                while runnable:
                    process = runnable.popleft()
                    progress = True
                    try:
                        kind, value = next(process)
                    except StopIteration:
                        continue
                    if kind == "sleep":
                        self.at(value, lambda process=process: runnable.append(process))
                    else:
                        waiting.append((value, process))
                    self.pump()
                for entry in list(waiting):
                    if entry[0]():
                        waiting.remove(entry)
                        runnable.append(entry[1])
                        progress = True
            if not self.heap:
                assert not waiting, "deadlock"
                break
            self.now, _, action = heapq.heappop(self.heap)
            action()
        return self.ended

    def pump(self):
        for j in range(self.times.stages):
            if self.outbox[j] and not self.busy_link[j] and self.outbox[j][0][0] in self.posted[j + 1]:
                key, seconds = self.outbox[j].popleft()
                self.busy_link[j] = True
                self.at(seconds, lambda j=j, key=key: self.deliver(j, key))
            if self.back_queue[j] and not self.busy_back[j]:
                slots, seconds = self.back_queue[j].popleft()
                self.busy_back[j] = True
                self.at(seconds, lambda j=j, slots=slots: self.deliver_back(j, slots))

    def deliver(self, j, key):
        self.busy_link[j] = False
        self.under_way[j] -= 1
        self.arrived[j + 1].add(key)

    def deliver_back(self, j, slots):
        self.busy_back[j] = False
        self.learn(j, slots)

    def learn(self, j, slots):
        for slot in slots:
            self.known[j][slot] += 1
        if j == 0:
            self.ended = self.now

    def stage(self, j):
        decider, decided = Decider(self.lengths, self.slots, self.sizes), deque()
        while True:
            if not decided:
                if (slots := decider.needed()) is None:
                    return
                yield "until", lambda slots=slots: decider.knows(self.known[j], slots)
                decided.extend(decider.decide())
                continue
            batch, tokens, past = decided.popleft()
            if j:
                self.posted[j].add(batch.number)
                yield "until", lambda batch=batch: batch.number in self.arrived[j]
                while not decided and (slots := decider.needed()) is not None and decider.knows(self.known[j], slots):
                    decided.extend(decider.decide())
                if decided:
                    self.posted[j].add(decided[0][0].number)
            yield "sleep", self.times.work(j, batch.phase, batch.size, tokens, past)
            if j == self.times.stages - 1:
                for other in range(j):
                    self.back_queue[other].append((batch.live, self.times.back(other, batch.size)))
                self.learn(j, batch.live)
                continue
            yield "until", lambda: self.under_way[j] < IN_FLIGHT_MESSAGES
            self.under_way[j] += 1
            self.outbox[j].append((batch.number, self.times.hop(j, batch.phase, batch.size, tokens)))


class Decider:
    """One stage's own view: its passes with their new tokens and cached tokens."""

    def __init__(self, lengths, slots, sizes):
        self.lengths, self.scheduler = lengths, Scheduler(slots, sizes)
        self.scheduler.add(prompt for prompt, _ in lengths)
        self.sequence, self.began, self.passed = [0] * slots, [0] * slots, [0] * slots

    def needed(self):
        return None if self.scheduler.next_group() is None else self.scheduler.list_pending_slots()

    def knows(self, known, slots):
        return all(known[slot] == self.passed[slot] for slot in slots)

    def decide(self):
        found = []
        for batch in self.scheduler.schedule(lambda slot: self.tokens(slot) == self.lengths[self.sequence[slot]][1]):
            for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
                self.sequence[slot], self.began[slot] = sequence, self.passed[slot]
            prompts = [self.lengths[self.sequence[slot]][0] for slot in batch.live]
            ends = [prompt + self.tokens(slot) - 1 for prompt, slot in zip(prompts, batch.live, strict=True)]
            for slot in batch.live:
                self.passed[slot] += 1
            found.append((batch, max(prompts), 0) if batch.phase == "prefill" else (batch, 1, max(ends)))
        return found

    def tokens(self, slot):
        return self.passed[slot] - self.began[slot]


@settings(max_examples=150)
@given(
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=14),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
def test_simulation_is_the_step_by_step_reference(stages, seed, lengths, slots, eta, xi, patience, fixed):
    times = VariedTimes(stages, seed)
    sizes = MicroBatchLimits(eta, 9 * eta, xi, patience, fixed)
    simulated = simulate(times, lengths, slots, sizes)
    # the reference notes the last tokens; a first stage with nothing more to hear ends there too
    assert simulated.latency_seconds == pytest.approx(Reference(times, lengths, slots, sizes).run())
    assert max(simulated.last_token_seconds) == simulated.latency_seconds
    assert min(simulated.last_token_seconds) > 0


def formula(times, m_p, m_d, generated):
    """(prefill, decode) as docs/planner.md has them."""
    ends = [(times.prefill, times.prefill_links), (times.decode, times.decode_links)]
    (prefill, slow), (ring, slowest) = ((sum(own) + sum(links), max(*own, *links)) for own, links in ends)
    return prefill + (m_p - 1) * slow, (generated - 1) * max(m_d * slowest, ring)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.data(), st.integers(1, 6), st.integers(1, 6), st.integers(2, 12))
def test_simulation_and_formula_agree_on_uniform_workloads(stages, data, m_p, m_d, generated):
    """Where links are no bottleneck they differ by a fill of the pipeline and decode's first round at most: the formula
    plays the phases one after the other, but a stage that prefill leaves idle may run all of that round meanwhile, and
    a message whose receive could not be posted ahead holds up a round by its own time."""
    prefill = data.draw(st.lists(SECONDS, min_size=stages, max_size=stages))
    decode = data.draw(st.lists(SECONDS, min_size=stages, max_size=stages))
    share = data.draw(st.floats(0.0, 0.3))
    links = [[share * min(work)] * (stages if stages > 1 else 1) for work in (prefill, decode)]
    if stages == 1:
        links = [[0.0], [0.0]]
    times = UniformTimes(prefill, decode, links[0], links[1])
    rows = 12 * m_p * m_d
    simulated = simulate(times, [(3, generated)] * rows, rows, MicroBatchLimits(rows // m_p, 3 * rows, rows // m_d))
    expected_prefill, expected_decode = formula(times, m_p, m_d, generated)
    expected = expected_prefill + expected_decode
    trip = sum(decode) + sum(links[1])
    drain = sum(prefill) + sum(links[0])
    first_round = max(trip, m_d * max(*decode, *links[1]))
    held_up = (generated - 1) * m_d * links[1][0] if m_d <= stages else 0.0
    assert expected - drain - first_round <= simulated.latency_seconds <= expected + trip + held_up + 1e-9


def test_one_micro_batch_is_the_formula_exactly():
    times = UniformTimes([0.2, 0.5, 0.3], [0.02, 0.05, 0.03], [0.01] * 3, [0.004] * 3)
    # prefill's tokens go back as decode's do
    simulated = simulate(times, [(4, 9)] * 6, 6, MicroBatchLimits(6, 24, 6))
    assert simulated.first_tokens_seconds == pytest.approx(1.0 + 0.02 + 0.004)
    assert simulated.latency_seconds == pytest.approx(1.024 + 8 * (0.1 + 0.012))


def test_groups_drop_out():
    times = UniformTimes([1.0], [1.0], [0.0], [0.0])
    simulated = simulate(times, [(1, 1), (1, 3), (1, 5)], 3, MicroBatchLimits(3, 3, 1))
    assert simulated.latency_seconds == pytest.approx(1 + 0 + 2 + 4)
    assert (simulated.busy_seconds(0), simulated.busy_seconds(0, "prefill")) == (7.0, 1.0)


def test_a_freed_slot_takes_the_next_sequence():
    """Two slots in groups of their own; one long sequence, and short ones that follow each other beside it."""
    times = UniformTimes([1.0], [1.0], [0.0], [0.0])
    lengths = [(1, 9), (1, 3), (1, 3), (1, 3)]
    simulated = simulate(times, lengths, 2, MicroBatchLimits(1, 1, 1))
    assert simulated.latency_seconds == 4 + (9 - 1) + 3 * (3 - 1), "a stage of its own is never idle"
    static = [
        simulate(times, part, 2, MicroBatchLimits(1, 1, 1)).latency_seconds for part in (lengths[:2], lengths[2:])
    ]
    assert sum(static) == simulated.latency_seconds, "one stage gains nothing but full micro-batches"
    together = simulate(times, lengths, 2, MicroBatchLimits(1, 1, 2, patience_rounds=0))
    assert together.latency_seconds < sum(static)


def test_a_call_of_several_is_one_piece_of_work():
    """Prompts of 128, 20 and 10 tokens and three slots. The first fills a call; the others pass beside its second
    token, and then all decode. Times are shared out by tokens."""

    class Times(UniformTimes):
        def work_joined(self, stage, parts):
            joined.append([tuple(part) for part in parts])
            return 0.31

    joined = []
    times = Times([1.0, 1.0], [10.0, 10.0], [0.0, 0.0], [0.0, 0.0])
    run = simulate(times, [(128, 3), (20, 2), (10, 2)], 3, MicroBatchLimits(4, 256, 3, 0, ragged=True))
    assert joined == [[("prefill", 2, 15, 0), ("decode", 1, 1, 128)]] * 2
    work = [span for span in run.spans if span.stage == 0 and not span.name.startswith("wait_")]
    assert [(span.name, span.rows, round(span.seconds, 6)) for span in work] == [
        ("prefill", 1, 1.0), ("prefill", 2, 0.3), ("decode", 1, 0.01), ("decode", 3, 10.0)
    ]  # fmt: skip
    assert run.latency_seconds == pytest.approx(2 * (1.0 + 0.31 + 10.0))


def test_chrome_events_do_not_overlap_on_a_stage():
    times = VariedTimes(3, 5)
    lengths = list(zip([3] * 6, [4, 2, 6, 1, 3, 5], strict=True))
    simulated = simulate(times, lengths, 4, MicroBatchLimits(2, 6, 3))
    for stage in range(3):
        events = sorted((e["ts"], e["dur"]) for e in simulated.build_chrome_events() if e["pid"] == stage)
        for (start, seconds), (following, _) in itertools.pairwise(events):
            assert start + seconds <= following + 1e-6
