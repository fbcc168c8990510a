"""A replay against a clock of its own: who is handed out when, and what is reported of it."""

from array import array

import pytest

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.batch.request import COMPLETIONS_URL, Request
from ds_llmpq.plan import MicroBatches, Plan, PredictedTotals, SolverReport, Stage, StageMemory, Workload
from ds_llmpq.scheduler.sampling_params import GREEDY
from ds_llmpq.serving.replay import Replay


def plan():
    stage = Stage(0, "h", "h:0", "cpu", (0, 4), (16,) * 4, None, StageMemory(0.0, 0.0, 0.0, 0.0, 0.0), 0.0, 0.1, 0.01)
    return Plan(
        model=None,
        workload=Workload(4, 8, 8),
        stages=(stage,),
        micro_batch=MicroBatches(2, 2),
        predicted=PredictedTotals(1.0, 1.0, 1.0, 1.0, 1.0),
        solver=SolverReport("hand", 0.0, None, None, 0.0, "checked"),
    )


class Clock:
    def __init__(self):
        self.now, self.room, self.alive = 100.0, None, 0

    def sleep(self, seconds):
        self.now += seconds

    def tick(self):
        self.alive += 1


def replay_of(arrivals, answers, policy, tokens=None):
    clock = Clock()
    requests = [
        PreparedRequest(
            Request(n, n + 1, str(n), COMPLETIONS_URL, None, "", GREEDY, arrival_seconds=when),
            array("i", range(4)),
            answer,
        )
        for n, (answer, when) in enumerate(zip(answers, arrivals, strict=True))
    ]
    found = Replay(
        requests, (2, 16), plan(), policy, tokens or answers, lambda: clock.room, clock.tick,
        lambda: clock.now, clock.sleep,
    )  # fmt: skip
    return found, clock


def keys(group):
    return [row.key for row in group.sequences]


@pytest.mark.parametrize(
    ("policy", "tokens", "first"),
    [("fcfs", None, [0, 1]), ("sjf", None, [3, 1]), ("ssjf", [9, 1, 1, 9], [1, 2]), ("longest_first", None, [0, 2])],
)
def test_the_policy_picks_among_those_that_have_come(policy, tokens, first):
    replay, clock = replay_of([0.0, 0.0, 0.0, 0.0, 50.0], [12, 4, 8, 2, 1], policy, [*tokens, 1] if tokens else None)
    group = replay.take()
    assert keys(group) == first
    assert (group.shape, group.joins, group.live) == ((2, 16), True, True)
    clock.room = 1
    assert len(keys(replay.take())) == 1
    assert len(keys(replay.take())) == 1
    empty = replay.take()
    assert (empty.sequences, empty.live, empty.shape) == ((), True, (2, 16)), "the last one has not come"
    clock.now += 60
    assert keys(replay.take()) == [4]
    assert replay.take() is None


def test_an_idle_engine_waits_for_the_next_request():
    replay, clock = replay_of([3.0, 9.0], [2, 2], "fcfs")
    assert keys(replay.take()) == [0]
    assert clock.now == pytest.approx(103.0)
    assert keys(replay.take()) == [1]
    assert clock.now == pytest.approx(109.0)
    assert clock.alive > 10, "somebody watches whether this is a hang"
    assert replay.take() is None


def test_completion_and_waiting_times():
    replay, clock = replay_of([0.0, 1.0], [2, 2], "fcfs")
    replay.take()
    clock.now += 4.0
    replay.end(0)
    clock.room = 2
    assert keys(replay.take()) == [1]
    clock.now += 2.0
    replay.end(1)
    report = replay.report()
    assert report["jct_seconds"]["mean"] == pytest.approx((4 + 5) / 2)
    assert report["waiting_seconds"] == pytest.approx({"mean": 1.5, "max": 3.0})
    assert report["makespan_seconds"] == pytest.approx(6.0)


def test_stopped_while_waiting():
    replay, clock = replay_of([0.0, 1e6], [2, 2], "fcfs")
    replay.take()
    replay.alive = replay.stop
    assert replay.take() is None
    assert clock.now < 102


def test_nothing_to_replay():
    replay, _ = replay_of([], [], "sjf")
    assert replay.take() is None
    assert replay.report()["jobs"] == 0
