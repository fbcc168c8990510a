"""What the plan's own times say of the requests as they turned out: the same passes, with the answers' real lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_llmpq.plan import Plan
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.scheduler import Scheduler
from ds_llmpq.scheduler.simulator import SimulatedRun, simulate

MOST_PASSES = 50_000  # about two seconds of simulation


@dataclass(frozen=True)
class PlanTimes:
    """`StageTimes` from plan.json. A prefill pass counts by its padded tokens, in proportion to the planned one; a
    decode pass counts as planned however many rows are left in it, since it reads the same weights."""

    plan: Plan

    @property
    def stages(self) -> int:
        return len(self.plan.stages)

    def work(self, stage: int, phase: str, rows: int, tokens: int, past: int) -> float:
        planned = self.plan.stages[stage]
        if phase == "decode":
            return planned.decode_seconds
        return planned.prefill_seconds * self._share(rows, tokens)

    def hop(self, stage: int, phase: str, rows: int, tokens: int) -> float:
        return self._link(phase, stage) * (self._share(rows, tokens) if phase == "prefill" else 1.0)

    def back(self, stage: int, rows: int) -> float:
        return self._link("decode", -1)

    def _share(self, rows: int, tokens: int) -> float:
        return rows * tokens / (self.plan.micro_batch.prefill * self.plan.workload.prompt_tokens)

    def _link(self, phase: str, index: int) -> float:
        links = self.plan.deployment and self.plan.deployment.link_seconds
        return getattr(links, phase)[index] if links else 0.0


def simulate_lengths(
    plan: Plan, lengths: Sequence[tuple[int, int]], slots: int, limits: MicroBatchLimits
) -> SimulatedRun | None:
    """The plan simulated with these (prompt, generated) tokens; None where that is too many passes to be worth it."""
    tokens = sum(generated for _, generated in lengths)
    if (len(lengths) + tokens / min(slots, limits.decode_rows)) * len(plan.stages) > MOST_PASSES:
        return None
    return simulate(PlanTimes(plan), lengths, slots, limits)


def decode_passes(lengths: Sequence[tuple[int, int]], slots: int, limits: MicroBatchLimits) -> int:
    """How many decode passes a stream of these (prompt, generated) tokens takes."""
    scheduler, count = Scheduler(slots, limits), 0
    scheduler.add(prompt for prompt, _ in lengths)
    left = [0] * slots  # tokens that each slot's sequence has yet to generate
    while scheduler.next_group() is not None:
        for batch in scheduler.schedule(lambda slot: left[slot] <= 0):
            count += batch.phase == "decode"
            for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
                left[slot] = lengths[sequence][1]
            for slot in batch.live:
                left[slot] -= 1
    return count
