"""DeepSpeed schedules of inference: every stage runs the same micro-batches in the same order.

Which micro-batch comes next is known on every stage from the tokens alone (`scheduler.scheduler`), so no message says
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_llmpq.scheduler.micro_batch import MicroBatch, take_call
from ds_llmpq.scheduler.stream import Stream


class PostReceive(PipeInstruction):
    """Start receiving a micro-batch's hidden states, before they are needed."""


class WaitActivation(PipeInstruction):
    """Wait for a micro-batch's hidden states from the previous stage."""


class SendActivation(PipeInstruction):
    """Start sending a micro-batch's hidden states to the next stage."""


class PrefillPass(PipeInstruction):
    """Run the stage's layers over a micro-batch's whole prompts."""


class DecodePass(PipeInstruction):
    """Run the stage's layers over one new token a row."""


class JoinedPass(PipeInstruction):
    """Run the stage's layers over several micro-batches in one call."""


class SampleTokens(PipeInstruction):
    """Last stage: choose each row's next token and send it to all other stages."""


class WaitTokens(PipeInstruction):
    """Wait until the last tokens of these slots are known here."""


class ReceiveRequests(PipeInstruction):
    """All stages together: take the driver's next request group, or hear that there is none."""


class StreamSchedule(PipeSchedule):
    """Micro-batches over the slots until all sequences have ended.

    While a stage works on one, the receive of the next one is posted if it is already certain which that is.
    """

    def __init__(self, source: Stream, stages: int, stage_id: int):
        super().__init__(1, stages, stage_id)
        self.source = source
        self.scheduled: deque[MicroBatch] = deque()

    def steps(self) -> Iterator[list[PipeInstruction]]:
        while True:
            if not self.scheduled:
                while self.source.wants_requests():
                    yield [ReceiveRequests()]
                pending = self.source.list_pending_slots()
                if pending is None:
                    return
                if pending:
                    yield [WaitTokens(slots=pending)]
                self.scheduled.extend(self.source.schedule())
                continue
            batches = take_call(self.scheduled)
            if not self.is_first_stage:
                yield [WaitActivation(batch=batch) for batch in batches]
                self._schedule_ahead()
                if self.scheduled:
                    yield [PostReceive(batch=self.scheduled[0])]
            yield [_work_on(batches), *(_send_on(self, batch) for batch in batches)]

    def _schedule_ahead(self) -> None:
        """The next micro-batches, if nothing has to be waited for. Scheduling early changes nothing about the order:
        decisions follow one another, and each depends on tokens alone. Requests are taken once this micro-batch has
        been sent on, since the driver may need it to get there."""
        while not self.scheduled and not self.source.wants_requests():
            pending = self.source.list_pending_slots()
            if pending is None or not self.source.has_tokens(pending):
                return
            self.scheduled.extend(self.source.schedule())


def _work_on(batches: list[MicroBatch]) -> PipeInstruction:
    if len(batches) > 1:
        return JoinedPass(batches=batches)
    return (PrefillPass if batches[0].phase == "prefill" else DecodePass)(batch=batches[0])


def _send_on(schedule: PipeSchedule, batch: MicroBatch) -> PipeInstruction:
    return SampleTokens(batch=batch) if schedule.is_last_stage else SendActivation(batch=batch)
