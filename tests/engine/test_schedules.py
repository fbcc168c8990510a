"""Schedules on simulated stages: the same passes in one order everywhere, whatever is slow and however rows end."""

from __future__ import annotations

import random
from collections import deque

import pytest

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES
from ds_llmpq.engine import schedules
from ds_llmpq.engine.schedules import StreamSchedule
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import Stream


class Line:
    """Messages from one stage to another, in order. A receive is matched with a send by its place in the row, as gloo
    and NCCL do it; a message can be taken once both are there and `deliver` has been called for it."""

    def __init__(self):
        self.sent: list = []
        self.posted: list = []
        self.delivered = 0
        self.taken = 0

    def deliver(self) -> bool:
        possible = self.delivered < min(len(self.sent), len(self.posted))
        self.delivered += possible
        return possible

    def take(self):
        if self.taken == self.delivered:
            return None
        self.taken += 1
        return self.sent[self.taken - 1]


class Stage:
    """Does what the engine does with each instruction, with names in the place of tensors."""

    def __init__(self, index: int, stages: int, run: Run):
        self.index, self.last, self.run = index, index == stages - 1, run
        self.place = {"stages": stages, "stage_id": index}
        self.passes: list = []
        self.posted: set = set()
        self.expected: deque = deque()
        self.asked = 0
        self.early_posts = 0
        self.ended: list = []
        self.hidden = None
        self.done = False

    def steps(self):
        """Yields before every instruction and, while one cannot go on, again and again."""
        held_back = self.run.groups[0]
        self.asked = 1
        while held_back is not None:
            self.stream = Stream(
                held_back, self.run.limits, self.next_group, self.finished, self.poll, lambda *row: None
            )
            for commands in StreamSchedule(self.stream, **self.place).steps():
                for command in commands:
                    yield True
                    while not self.execute(command):
                        yield False
            held_back = self.stream.held_back
        self.done = True

    def next_group(self):
        self.asked += 1
        return self.run.groups[self.asked - 1] if self.asked <= len(self.run.groups) else None

    def finished(self, row, tokens, finish):
        self.ended.append((row.key, len(tokens)))

    def execute(self, command) -> bool:
        return getattr(self, f"do_{type(command).__name__}")(**command.kwargs)

    def do_ReceiveRequests(self):
        """All together: nobody goes on before everybody has come."""
        if self.run.asking[self.index] < self.asked:
            self.run.asking[self.index] = self.asked
        if min(self.run.asking) < self.asked:
            return False
        self.stream.take_requests()
        return True

    def do_PostReceive(self, batch):
        self.post(batch)
        self.early_posts += 1
        return True

    def do_WaitActivation(self, batch):
        self.post(batch)
        message = self.run.activations[self.index - 1].take()
        if message is None:
            return False
        self.posted.remove(batch)
        assert message == batch, "another micro-batch's hidden states"
        self.hidden = message
        return True

    def do_PrefillPass(self, batch):
        return self.compute("prefill", batch)

    def do_DecodePass(self, batch):
        return self.compute("decode", batch)

    def do_SendActivation(self, batch):
        line = self.run.activations[self.index]
        if len(line.sent) - line.delivered >= IN_FLIGHT_MESSAGES:
            return False
        line.sent.append(batch)
        self.expected.append(batch)
        return True

    def do_SampleTokens(self, batch):
        table = self.stream.slots
        tokens, finish = [], []
        for slot in batch.slots:
            live = slot in batch.live
            generated = len(table.generated[slot]) + 1 if live else 0
            tokens.append(generated)
            finish.append(self.run.finish(table.sequences[slot].key, generated) if live else Finish.RUNNING)
        for line in self.run.tokens:
            line.sent.append((tokens, finish))
            line.posted.append(None)
        self.stream.record(batch, tokens, finish)
        return True

    def do_WaitTokens(self, slots):
        while self.stream.slots.are_awaited(slots):
            if not self.take_tokens():
                return False
        return True

    def compute(self, phase, batch):
        assert batch.phase == phase
        assert self.index == 0 or self.hidden == batch
        self.passes.append(batch)
        assert len(self.passes) < 2000, "goes on after all rows have ended"
        return True

    def post(self, batch):
        if batch not in self.posted:
            self.posted.add(batch)
            self.run.activations[self.index - 1].posted.append(batch)

    def poll(self):
        while not self.last and self.take_tokens():
            pass

    def take_tokens(self) -> bool:
        message = self.run.tokens[self.index].take()
        if message is None:
            return False
        self.stream.record(self.expected.popleft(), *message)
        return True


class Run:
    """A pipeline whose stages and messages advance in random order, each at a speed of its own."""

    def __init__(self, seed: int, stages: int):
        draw = self.random = random.Random(seed)
        self.ends = [draw.choice((1, 1, 2, draw.randint(1, 9))) for _ in range(draw.randint(1, 30))]
        self.limits = MicroBatchLimits(
            draw.randint(1, 5), draw.randint(1, 60), draw.randint(1, 4), draw.randint(0, 3), draw.random() < 0.2
        )
        self.groups = self.cut(draw)
        self.asking = [0] * stages
        self.activations = [Line() for _ in range(stages - 1)]
        self.tokens = [Line() for _ in range(stages - 1)]
        self.stages = [Stage(index, stages, self) for index in range(stages)]
        self.speeds = [draw.choice((0.05, 1.0)) for _ in range(stages + 2 * len(self.tokens))]

    def cut(self, draw) -> list[RequestGroup]:
        """Groups of some shapes, most of which join the one before."""
        rows = [Sequence(key, (1,) * draw.randint(1, 20), 9) for key in range(len(self.ends))]
        groups, shape = [], (draw.randint(1, 7), 99)
        while rows:
            if draw.random() < 0.3:
                shape = (draw.randint(1, 7), draw.choice((50, 99)))
            count = draw.randint(1, 9)
            groups.append(RequestGroup(tuple(rows[:count]), *shape, joins=draw.random() < 0.8))
            rows = rows[count:]
        return groups

    def finish(self, key: int, generated: int) -> Finish:
        return Finish.LENGTH if generated >= self.ends[key] else Finish.RUNNING

    def to_the_end(self) -> None:
        actors = [stage.steps() for stage in self.stages]
        lines = self.activations + self.tokens
        still = 0
        while not all(stage.done for stage in self.stages):
            actor = self.random.choices(range(len(self.speeds)), self.speeds)[0]
            stage = actor < len(actors)
            moved = next(actors[actor], False) if stage else lines[actor - len(actors)].deliver()
            still = 0 if moved else still + 1
            assert still < 20_000, "deadlock: nothing moves"


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_all_stages_run_the_same_passes(stages):
    early = 0
    for seed in range(200 // stages):
        run = Run(seed, stages)
        run.to_the_end()
        for stage in run.stages:
            assert stage.passes == run.stages[0].passes, f"seed {seed}"
            assert sorted(stage.ended) == list(enumerate(run.ends)), f"seed {seed}: not every row once, to its end"
            assert not stage.posted, f"seed {seed}: a receive was posted for a message that never comes"
            assert not stage.expected
        for line in run.activations:
            assert line.sent == line.posted, f"seed {seed}: a receive met another's message"
        early += sum(stage.early_posts for stage in run.stages)
    assert stages == 1 or early > 50


def stream_of(rows, slots, sizes, poll=lambda: None):
    group = RequestGroup(tuple(Sequence(key, (1,), 9) for key in range(rows)), slots, 20)
    return Stream(group, sizes, lambda: None, lambda *ended: None, poll, lambda *row: None)


@pytest.mark.parametrize("known", [True, False])
def test_a_receive_is_posted_ahead_only_for_a_pass_that_is_certain(known):
    """Two groups of one slot, both prefilled; the second one's token is known or not at the first one's pass."""
    stream = stream_of(2, 2, MicroBatchLimits(2, 2, 1))
    stream.take_requests()
    steps = StreamSchedule(stream, stages=2, stage_id=1).steps()
    prefill = next(command for step in steps for command in step if isinstance(command, schedules.PrefillPass))
    slots = prefill.kwargs["batch"].slots
    stream.record(prefill.kwargs["batch"], [5] * 2, [0] * 2)
    if not known:
        stream.slots._awaited[slots[1]] = True
    kinds = []
    for step in steps:
        kinds += [type(command) for command in step]
        if schedules.DecodePass in kinds:
            break
    assert (schedules.PostReceive in kinds) is known
