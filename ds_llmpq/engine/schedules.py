"""DeepSpeed schedules of inference: every stage walks through the same passes in the same order.

Which pass comes next is known on every stage from the tokens alone (`scheduler.scheduler`), so no message says it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_llmpq.engine.sequences import MicroBatch
from ds_llmpq.scheduler.scheduler import Pass


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
    """Wait until the last tokens of these slots are known here."""


class TakeRequests(PipeInstruction):
    """All stages together: take the driver's next wave, or hear that there is none."""


class OncePerBatch(PipeSchedule):
    """Each micro-batch passes once; the receive of the next is posted before the work on this one begins."""

    def __init__(self, micro_batches: list[MicroBatch], stages: int, stage_id: int):
        super().__init__(len(micro_batches), stages, stage_id)
        self.batches = micro_batches

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for index, batch in enumerate(self.batches):
            commands: list[PipeInstruction] = []
            if not self.is_first_stage:
                commands.append(TakeActivation(batch=batch))
                if index + 1 < len(self.batches):
                    commands.append(PostReceive(batch=self.batches[index + 1]))
            commands.append(PrefillPass(batch=batch))
            commands.append(_hand_on(self, batch))
            yield commands


class Decisions(Protocol):
    """Where a stage's passes come from."""

    def wants_requests(self) -> bool:
        """Whether a wave must be taken before the next passes are decided."""

    def needed(self) -> list[int] | None:
        """Slots whose tokens the next decision needs; None when all is done."""

    def known(self, slots: list[int]) -> bool:
        """Whether they are known by now, without waiting."""

    def decide(self) -> list[Pass]:
        """The next passes; possibly none."""


class StreamSchedule(PipeSchedule):
    """Passes over the slots until all sequences have ended.

    While a stage works on a pass, the receive of the next one is posted if it is already certain which that is.
    """

    def __init__(self, decisions: Decisions, stages: int, stage_id: int):
        super().__init__(1, stages, stage_id)
        self.decisions = decisions
        self.decided: deque[Pass] = deque()

    def steps(self) -> Iterator[list[PipeInstruction]]:
        while True:
            if not self.decided:
                while self.decisions.wants_requests():
                    yield [TakeRequests()]
                needed = self.decisions.needed()
                if needed is None:
                    return
                if needed:
                    yield [TakeTokens(slots=needed)]
                self.decided.extend(self.decisions.decide())
                continue
            batch = self.decided.popleft()
            if not self.is_first_stage:
                yield [TakeActivation(batch=batch)]
                self._decide_ahead()
                if self.decided:
                    yield [PostReceive(batch=self.decided[0])]
            work = PrefillPass if batch.phase == "prefill" else DecodePass
            yield [work(batch=batch), _hand_on(self, batch)]

    def _decide_ahead(self) -> None:
        """The next passes, if nothing has to be waited for. Deciding early changes nothing about the order: decisions
        follow one another, and each depends on tokens alone. Taking requests is left to when this pass is handed on,
        since the driver may need it to get there."""
        while not self.decided and not self.decisions.wants_requests():
            needed = self.decisions.needed()
            if needed is None or not self.decisions.known(needed):
                return
            self.decided.extend(self.decisions.decide())


def _hand_on(schedule: PipeSchedule, batch: Pass | MicroBatch) -> PipeInstruction:
    return Sample(batch=batch) if schedule.is_last_stage else GiveActivation(batch=batch)
