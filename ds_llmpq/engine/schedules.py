"""DeepSpeed schedules of inference: every stage walks through the same micro-batches in the same order.

Prefill visits each micro-batch once. Decode goes round the groups until all are finished; which groups are still
running is known on every stage from the tokens alone, so no message says what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_llmpq.engine.sequences import MicroBatch, Sequences


class PostReceive(PipeInstruction):
    """Start receiving a micro-batch's hidden states, before they are needed."""


class TakeActivation(PipeInstruction):
    """Wait for a micro-batch's hidden states from the previous stage."""


class GiveActivation(PipeInstruction):
    """Start sending a micro-batch's hidden states to the next stage."""


class PrefillPass(PipeInstruction):
    """Run the stage's layers over a micro-batch's whole prompts."""


class DecodePass(PipeInstruction):
    """Run the stage's layers over one new token a row."""


class Sample(PipeInstruction):
    """Last stage: choose each row's next token and give it to all other stages."""


class TakeTokens(PipeInstruction):
    """Wait until the tokens of the micro-batch's previous pass are known here."""


class PrefillSchedule(PipeSchedule):
    """Each micro-batch passes once; the receive of the next is posted before the work on this one begins."""

    def __init__(self, micro_batches: list[MicroBatch], stages: int, stage_id: int):
        super().__init__(len(micro_batches), stages, stage_id)
        self.batches = micro_batches

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for index, batch in enumerate(self.batches):
            commands: list[PipeInstruction] = []
            if not self.is_first_stage:
                commands.append(TakeActivation(micro_batch=batch, prefill=True))
                if index + 1 < len(self.batches):
                    commands.append(PostReceive(micro_batch=self.batches[index + 1], prefill=True))
            commands.append(PrefillPass(micro_batch=batch))
            commands.append(_hand_on(self, batch))
            yield commands


class DecodeSchedule(PipeSchedule):
    """Rounds over the groups until all are finished.

    `poll` takes in tokens that have already arrived without waiting, so that the next group's receive can be posted
    early when it is already certain that the group goes on.
    """

    def __init__(
        self,
        groups: list[MicroBatch],
        sequences: Sequences,
        poll: Callable[[], None],
        stages: int,
        stage_id: int,
    ):
        super().__init__(len(groups), stages, stage_id)
        self.groups = groups
        self.sequences = sequences
        self.poll = poll

    def steps(self) -> Iterator[list[PipeInstruction]]:
        going = list(self.groups)
        while going:
            for group in list(going):
                yield [TakeTokens(micro_batch=group)]
                if not self.sequences.running(group):
                    going.remove(group)
                    continue
                commands: list[PipeInstruction] = []
                if not self.is_first_stage:
                    commands.append(TakeActivation(micro_batch=group, prefill=False))
                    commands.extend(self._post_next(group, going))
                commands.append(DecodePass(micro_batch=group))
                commands.append(_hand_on(self, group))
                yield commands

    def _post_next(self, group: MicroBatch, going: list[MicroBatch]) -> list[PipeInstruction]:
        following = going[(going.index(group) + 1) % len(going)]
        if following == group:
            return []
        self.poll()
        if self.sequences.awaited(following) or not self.sequences.running(following):
            return []
        return [PostReceive(micro_batch=following, prefill=False)]


def _hand_on(schedule: PipeSchedule, batch: MicroBatch) -> PipeInstruction:
    return Sample(micro_batch=batch) if schedule.is_last_stage else GiveActivation(micro_batch=batch)
