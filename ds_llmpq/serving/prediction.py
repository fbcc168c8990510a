"""What the plan's own times say of the requests as they turned out: the same passes, with the answers' real lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ds_llmpq.engine.batch_limits import build_limits
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.files import write_json
from ds_llmpq.plan import Plan
from ds_llmpq.quant.kernels.registry import find_stage_kernel
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.scheduler import Scheduler
from ds_llmpq.scheduler.simulator import CallPart, SimulatedRun, simulate

MOST_PASSES = 50_000  # about a second of simulation
MOST_PASSES_OF_RUN = 4 * MOST_PASSES  # a run of that many takes minutes, and its verdict is worth four seconds
_MOST_EVENTS = 100_000  # what a trace viewer still opens

# slots; (prompt, generated) tokens of each sequence; how many of each prompt's are a shared prefix, (): none of any;
# how many tokens each might have come to, (): unknown, and of no use unless they share cache blocks
LengthsOfStream = tuple[int, Sequence[tuple[int, int]], Sequence[int], Sequence[int]]


class PlanTimes:
    """`StageTimes` from plan.json: each pass by its own size. A stage's first pass of a number of tokens takes longer,
    so an object is for one run of a pipeline. A plan without times by size counts a prefill pass by its padded tokens,
    in proportion to the planned one, and all decode passes as planned."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._met: set[tuple[int, int]] = set()  # (stage, tokens of a pass's last call)

    @property
    def stages(self) -> int:
        return len(self.plan.stages)

    def work(self, stage: int, phase: str, rows: int, tokens: int, past: float) -> float:
        planned = self.plan.stages[stage]
        times = planned.prefill_times if phase == "prefill" else planned.decode_times
        if times is None:
            return planned.prefill_seconds * self._share(rows, tokens) if phase == "prefill" else planned.decode_seconds
        seconds = times.interpolate(rows, tokens if phase == "prefill" else past)
        if phase == "prefill" and past:  # its tokens attend to those before them, as the last ones of a long prompt do
            longer = times.interpolate(rows, past + tokens) - times.interpolate(rows, past)
            seconds = max(seconds, longer + times.interpolate(rows, 1))
        size = stage, find_stage_kernel(planned.kernel).pad_call(rows * tokens)
        if size in self._met:
            return seconds
        self._met.add(size)
        return seconds + planned.first_pass_seconds

    def work_joined(self, stage: int, parts: Sequence[CallPart]) -> float:
        """As prefill of so many tokens, and for each decode row what its attention to earlier tokens adds."""
        tokens = sum(part.rows * part.tokens for part in parts)
        earlier = sum(part.past * part.rows * part.tokens for part in parts if part.phase == "prefill")
        seconds = self.work(stage, "prefill", 1, tokens, earlier / tokens)
        if times := self.plan.stages[stage].decode_times:
            attention = (
                times.interpolate(part.rows, part.past) - times.interpolate(part.rows, 0)
                for part in parts
                if part.phase == "decode"
            )
            seconds += max(0.0, *attention, 0.0)
        return seconds

    def hop(self, stage: int, phase: str, rows: int, tokens: int) -> float:
        return self._link(phase, stage) * (self._share(rows, tokens) if phase == "prefill" else 1.0)

    def back(self, stage: int, rows: int) -> float:
        return self._link("decode", -1)

    def _share(self, rows: int, tokens: int) -> float:
        return rows * tokens / (self.plan.micro_batch.prefill * self.plan.workload.prefill_tokens)

    def _link(self, phase: str, index: int) -> float:
        links = self.plan.deployment and self.plan.deployment.link_seconds
        return getattr(links, phase)[index] if links else 0.0


def simulate_streams(
    plan: Plan, streams: Iterable[LengthsOfStream], limits: MicroBatchLimits, most_passes: int = MOST_PASSES
) -> list[SimulatedRun] | None:
    """The plan simulated with these streams, one after another; None where there are none, or more than `most_passes`
    of all stages."""
    times, found, passes = PlanTimes(plan), [], 0.0
    for slots, lengths, shared, most in streams:
        tokens = sum(generated for _, generated in lengths)
        passes += (len(lengths) + tokens / min(slots, limits.decode_rows)) * len(plan.stages)
        if passes > most_passes:
            return None
        found.append(simulate(times, lengths, slots, limits, shared, most))
    return found or None


def simulate_run(
    plan: Plan,
    streams: Sequence[LengthsOfStream],
    limits: MicroBatchLimits,
    prefix_tokens: int = 0,
    most_passes: int = MOST_PASSES,
) -> list[SimulatedRun] | None:
    """A run of these streams, and of the prefix that is computed before them; else as `simulate_streams`."""
    prefix = [(1, [(prefix_tokens, 1)], (), ())] if prefix_tokens and streams else []
    return simulate_streams(plan, [*prefix, *streams], limits, most_passes)


def simulate_workload(plan: Plan, options: EngineConfig, splits_prompts: bool = True) -> list[SimulatedRun] | None:
    """A run of the plan's own workload, all sequences alike. `splits_prompts`: as `build_limits` has it."""
    workload = plan.workload
    prefix = workload.prefix_positions(plan.cache_block)
    limits = build_limits(plan, options, splits_prompts, plan.is_ragged and splits_prompts, prefix)
    lengths = [(workload.prompt_tokens, workload.generated_tokens)] * workload.sequences
    shared = [workload.shared_tokens] * workload.sequences
    most = [workload.prompt_tokens + workload.generated_tokens] * workload.sequences
    return simulate_run(plan, [(workload.sequences, lengths, shared, most)], limits, workload.shared_tokens)


def sum_seconds(simulated: Iterable[SimulatedRun] | None) -> float | None:
    """Of streams, which follow one another; None where there are none."""
    return sum(run.latency_seconds for run in simulated) if simulated else None


def name_stages(plan: Plan) -> list[dict]:
    """Events by which a trace viewer shows each stage under its number and device."""
    names = [f"stage {index}: {stage.device}" for index, stage in enumerate(plan.stages)]
    return [{"name": "process_name", "ph": "M", "pid": i, "args": {"name": name}} for i, name in enumerate(names)]


def write_predicted_trace(plan: Plan, simulated: Iterable[SimulatedRun], folder: Path) -> None:
    """Writes predicted_trace.json, to compare with a run's trace.json; streams follow one another."""
    start, events = 0.0, name_stages(plan)
    for run in simulated:
        events += run.build_chrome_events(start)
        start += run.latency_seconds
    write_json(folder / "predicted_trace.json", {"traceEvents": events[:_MOST_EVENTS], "displayTimeUnit": "ms"})


def decode_passes(
    lengths: Sequence[tuple[int, int]],
    slots: int,
    limits: MicroBatchLimits,
    shared_tokens: Sequence[int] = (),
    most_tokens: Sequence[int] = (),
) -> int:
    """How many decode passes a stream of these (prompt, generated) tokens takes, of which `shared_tokens` are not
    computed; each might have come to `most_tokens`."""
    scheduler, count = Scheduler(slots, limits), 0
    scheduler.add((prompt for prompt, _ in lengths), shared_tokens, most_tokens)
    left = [generated for _, generated in lengths]  # tokens that each sequence has yet to generate
    held = [0] * slots
    while scheduler.next_group() is not None:
        for batch in scheduler.schedule(lambda slot: left[held[slot]] <= 0):
            count += batch.phase == "decode"
            for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
                held[slot] = sequence
            for slot in batch.live:
                left[held[slot]] -= 1
    return count
