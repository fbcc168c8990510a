"""Schedules on simulated stages: the same passes in one order everywhere, whatever is slow and however rows end."""

from __future__ import annotations

import random
from collections import deque

import pytest

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES
from ds_llmpq.engine import schedules
from ds_llmpq.engine.schedules import DecodeSchedule, PrefillSchedule
from ds_llmpq.engine.sequences import Finish, MicroBatch, Sequences, decode_groups, prefill_micro_batches


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
        self.sequences = Sequences(run.prompt_tokens)
        self.passes: list[tuple[str, MicroBatch]] = []
        self.posted: set[MicroBatch] = set()
        self.expected: deque[MicroBatch] = deque()
        self.early_posts = 0
        self.hidden = None
        self.done = False

    def steps(self):
        """Yields before every instruction and, while one cannot go on, again and again."""
        prefill = PrefillSchedule(self.run.prefill, **self.place)
        decode = DecodeSchedule(self.run.groups, self.sequences, self.poll, **self.place)
        for schedule in (prefill, decode):
            for commands in schedule.steps():
                for command in commands:
                    yield True
                    while not self.execute(command):
                        yield False
        self.done = True

    def execute(self, command) -> bool:
        return getattr(self, f"do_{type(command).__name__}")(**command.kwargs)

    def do_PostReceive(self, micro_batch, prefill):
        self.post(micro_batch)
        self.early_posts += 1
        return True

    def do_TakeActivation(self, micro_batch, prefill):
        self.post(micro_batch)
        message = self.run.activations[self.index - 1].take()
        if message is None:
            return False
        self.posted.remove(micro_batch)
        assert message == ("prefill" if prefill else "decode", micro_batch), "another micro-batch's hidden states"
        self.hidden = message
        return True

    def do_GiveActivation(self, micro_batch):
        line = self.run.activations[self.index]
        if len(line.sent) - line.delivered >= IN_FLIGHT_MESSAGES:
            return False
        line.sent.append(self.passes[-1])
        self.sequences.started(micro_batch)
        self.expected.append(micro_batch)
        self.run.tokens[self.index].posted.append(micro_batch)
        return True

    def do_PrefillPass(self, micro_batch):
        return self.compute("prefill", micro_batch)

    def do_DecodePass(self, micro_batch):
        return self.compute("decode", micro_batch)

    def do_Sample(self, micro_batch):
        finish = [self.run.finish(row, len(self.sequences.generated[row]) + 1) for row in micro_batch.rows()]
        tokens = [100 * row + len(self.sequences.generated[row]) for row in micro_batch.rows()]
        for line in self.run.tokens:
            line.sent.append((tokens, finish))
        self.sequences.record(micro_batch, tokens, finish)
        return True

    def do_TakeTokens(self, micro_batch):
        while self.sequences.awaited(micro_batch):
            if not self.take_tokens():
                return False
        return True

    def compute(self, kind, micro_batch):
        assert self.index == 0 or self.hidden == (kind, micro_batch)
        assert not self.sequences.awaited(micro_batch), "its last tokens are not known yet"
        self.passes.append((kind, micro_batch))
        assert len(self.passes) < 500, "goes on after all rows have ended"
        return True

    def post(self, micro_batch):
        if micro_batch not in self.posted:
            self.posted.add(micro_batch)
            self.run.activations[self.index - 1].posted.append(micro_batch)

    def poll(self):
        while not self.last and self.take_tokens():
            pass

    def take_tokens(self) -> bool:
        message = self.run.tokens[self.index].take()
        if message is None:
            return False
        self.sequences.record(self.expected.popleft(), *message)
        return True


class Run:
    """A pipeline whose stages and messages advance in random order, each at a speed of its own."""

    def __init__(self, seed: int, stages: int):
        draw = self.random = random.Random(seed)
        rows = draw.randint(1, 12)
        self.prompt_tokens = [draw.randint(1, 20) for _ in range(rows)]
        self.ends = [draw.choice((1, 1, 2, draw.randint(1, 9))) for _ in range(rows)]
        self.prefill = prefill_micro_batches(self.prompt_tokens, draw.randint(1, 5), draw.randint(1, 60))
        self.groups = decode_groups(rows, draw.randint(1, rows))
        self.activations = [Line() for _ in range(stages - 1)]
        self.tokens = [Line() for _ in range(stages - 1)]
        self.stages = [Stage(index, stages, self) for index in range(stages)]
        self.speeds = [draw.choice((0.05, 1.0)) for _ in range(stages + 2 * len(self.tokens))]

    def finish(self, row: int, generated: int) -> Finish:
        return Finish.LENGTH if generated >= self.ends[row] else Finish.RUNNING

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
            assert [len(tokens) for tokens in stage.sequences.generated] == run.ends, f"seed {seed}"
            assert not stage.posted, f"seed {seed}: a receive was posted for a message that never comes"
            assert not stage.expected
        for line in run.activations:
            assert [batch for _, batch in line.sent] == line.posted, f"seed {seed}: a receive met another's message"
        early += sum(stage.early_posts for stage in run.stages)
    assert stages == 1 or early > 50


@pytest.mark.parametrize("stages", [1, 3])
def test_each_group_s_passes_end_with_its_last_row(stages):
    for seed in range(40):
        run = Run(seed, stages)
        run.to_the_end()
        passes = run.stages[-1].passes
        assert [batch for kind, batch in passes if kind == "prefill"] == run.prefill
        for group in run.groups:
            assert passes.count(("decode", group)) == max(run.ends[row] for row in group.rows()) - 1


def commands_of(schedule):
    return [[type(command) for command in step] for step in schedule.steps()]


def test_the_receive_of_the_next_prompts_is_posted_before_the_work_on_these():
    batches = [MicroBatch(0, 2), MicroBatch(2, 3)]
    first, second = commands_of(PrefillSchedule(batches, stages=3, stage_id=1))
    assert first == [
        schedules.TakeActivation, schedules.PostReceive, schedules.PrefillPass, schedules.GiveActivation
    ]  # fmt: skip
    assert second == [schedules.TakeActivation, schedules.PrefillPass, schedules.GiveActivation]
    assert commands_of(PrefillSchedule(batches, stages=3, stage_id=0))[0] == [
        schedules.PrefillPass, schedules.GiveActivation
    ]  # fmt: skip
    assert commands_of(PrefillSchedule(batches, stages=3, stage_id=2))[1] == [
        schedules.TakeActivation, schedules.PrefillPass, schedules.Sample
    ]  # fmt: skip


def test_a_receive_is_posted_ahead_only_for_a_group_that_surely_goes_on():
    groups = [MicroBatch(0, 1), MicroBatch(1, 2)]
    for tokens_known, ended, ahead in [(True, False, True), (False, False, False), (True, True, False)]:
        rows = Sequences([1, 1])
        rows.record(groups[0], [5], [0])
        if tokens_known:
            rows.record(groups[1], [5], [Finish.LENGTH if ended else 0])
        else:
            rows.started(groups[1])
        steps = DecodeSchedule(groups, rows, lambda: None, stages=2, stage_id=1).steps()
        next(steps)
        posted = [command for command in next(steps) if isinstance(command, schedules.PostReceive)]
        assert [command.kwargs["micro_batch"] for command in posted] == ([groups[1]] if ahead else [])


def test_tokens_that_came_meanwhile_let_the_next_receive_be_posted():
    groups = [MicroBatch(0, 1), MicroBatch(1, 2)]
    rows = Sequences([1, 1])
    rows.record(groups[0], [5], [0])
    rows.started(groups[1])
    steps = DecodeSchedule(groups, rows, lambda: rows.record(groups[1], [5], [0]), stages=2, stage_id=1).steps()
    next(steps)
    assert schedules.PostReceive in map(type, next(steps))
