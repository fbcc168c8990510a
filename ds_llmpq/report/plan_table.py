"""A plan as plain text: stages, predictions, and how far it is proven optimal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from ds_llmpq.plan import ESTIMATES, Plan, PredictedTotals
from ds_llmpq.quant.packing import UNQUANTIZED_BITS
from ds_llmpq.wording import format_number, format_size, pluralize

_MOST_STAGES = 4  # named in a line
_LITTLE = 0.01  # of the predicted time
# how the notes begin that are shown without -v
_SHOWN = ("Quantized:", "Not quantized:", "Deadline ", "Gain of planning")


def format_plan(plan: Plan) -> str:
    """The whole plan: stages, sizes, predictions, solver and baselines."""
    rows = [
        [
            str(index),
            stage.device,
            stage.device_type,
            f"{stage.layers[0]}-{stage.layers[1] - 1}",
            format_bits(stage.bits) + _head_text(plan, index),
            " + ".join(f"{name} {format_size(held)}" for name, held in stage.memory_bytes.by_part().items() if held),
            f"{format_size(stage.memory_bytes.total)} / {format_size(stage.memory_budget_bytes)}",
            format_milliseconds(stage.prefill_seconds),
            format_milliseconds(stage.decode_seconds),
        ]
        for index, stage in enumerate(plan.stages)
    ]
    head = ["stage", "device", "type", "layers", "bits", "memory", "used / budget", "prefill ms", "decode ms"]
    parts = [format_table(head, rows), *_summary(plan)]
    return "\n".join(parts)


def describe_plan(plan: Plan) -> str:
    """A line for the stages and what the plan predicts for the planned workload, one for what was quantized and why,
    and one for what planning gains where several devices can be used."""
    shown = [
        f"{stage.device} layers {stage.layers[0]}-{stage.layers[1] - 1} at {_list_widths(stage.bits)} bits"
        for stage in plan.stages
    ]
    stages = "; ".join(shown[:_MOST_STAGES]) + ("; ..." if len(shown) > _MOST_STAGES else "")
    workload = plan.workload
    lines = [
        f"plan: {stages}; {format_number(plan.predicted.throughput_tokens_per_second, 4)} tokens/s predicted on "
        f"{pluralize(workload.sequences, 'sequence')} of {workload.prompt_tokens} + {workload.generated_tokens} tokens"
        f"{_describe_run(plan)}",
        *(sentence for sentence in plan.explanation if sentence.startswith(_SHOWN)),
    ]
    if (cost := predict_cost(plan)) is not None:
        lines.append(f"cost: {describe_cost(cost)}")
    return "\n".join(lines)


def _describe_run(plan: Plan) -> str:
    """What a run of the workload is predicted to reach, by the same simulation as its verdict: it counts each stage's
    first pass of a size, which the planned times leave out. Nothing where that is too little to be seen."""
    if plan.run_seconds is None or plan.run_seconds < (1 + _LITTLE) * plan.predicted.latency_seconds:
        return ""
    speed = plan.workload.sequences * plan.workload.generated_tokens / plan.run_seconds
    return f"; {format_number(speed, 4)} as a run, in which a stage's first pass of each size takes longer"


def _bits_text(plan: Plan) -> str:
    return "" if plan.bits_per_weight is None else f" at {plan.bits_per_weight:.2f} bits per weight"


def _list_widths(bits: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(bits))))


def format_bits(bits: Sequence[int]) -> str:
    """Runs of equal bit widths: `4x3 8x2` means three layers at 4 bits, then two at 8."""
    return " ".join(f"{width}x{len(list(run))}" for width, run in groupby(bits))


def _head_text(plan: Plan, index: int) -> str:
    """Bit width of a quantized lm_head, for the stage that holds it."""
    width = plan.lm_head_bits
    return f" head {width}" if width < UNQUANTIZED_BITS and index == len(plan.stages) - 1 else ""


def format_milliseconds(seconds: float) -> str:
    return format_number(seconds * 1e3)


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _summary(plan: Plan) -> list[str]:
    workload, predicted, solver = plan.workload, plan.predicted, plan.solver
    proof = f", {solver.proof}" if solver.proof else ""
    shared = f", {workload.shared_tokens} of the prompt in common" if workload.shared_tokens else ""
    pool = f"; they share {plan.cache_positions} positions of KV cache" if plan.is_paged else ""
    lines = [
        f"workload: {pluralize(workload.sequences, 'sequence')} of {workload.prompt_tokens} prompt + "
        f"{workload.generated_tokens} generated tokens{shared}{pool}; micro-batches of "
        f"{plan.micro_batch.prefill} in prefill, {plan.micro_batch.decode} in decode",
        f"predicted: {format_number(predicted.latency_seconds, 4)} s per batch (prefill "
        f"{format_number(predicted.prefill_seconds, 4)}, decode {format_number(predicted.decode_seconds, 4)}), "
        f"{format_number(predicted.throughput_tokens_per_second, 4)} tokens/s, quality loss "
        f"{format_number(predicted.quality_loss)} nats per token" + _bits_text(plan) + _describe_run(plan),
        f"solver: {solver.name}, {solver.status}, objective {format_number(solver.objective, 5)}{proof}, "
        f"{format_number(solver.seconds, 2)} s",
    ]
    if (cost := predict_cost(plan)) is not None:
        lines.append(f"cost: {describe_cost(cost)}")
    if plan.baselines:
        lines.append(
            "baselines: "
            + "; ".join(f"{name_baseline(name)} {_baseline(plan, entry)}" for name, entry in plan.baselines.items())
        )
    lines += [f"note: {sentence}" for sentence in plan.explanation]
    lines += [f"origin of {name}: {origin}" for name, origin in plan.provenance.items()]
    return lines


def predict_cost(plan: Plan) -> dict[str, float | None] | None:
    """`Plan.compute_cost` of the planned batch."""
    workload = plan.workload
    counts = (workload.sequences * tokens for tokens in (workload.prompt_tokens, workload.generated_tokens))
    return plan.compute_cost(plan.predicted.latency_seconds, *counts)


def describe_cost(cost: Mapping[str, float | None]) -> str:
    """A cost from `Plan.compute_cost` in words, in the currency of the cluster's prices."""
    total, hourly, generated, both = (
        "-" if (value := cost[name]) is None else format_number(value)
        for name in ("total", "price_per_hour", "per_million_generated_tokens", "per_million_tokens")
    )
    per_million = f"{generated} (only generated ones), {both} (with prompts)"
    return f"{total} in all at {hourly} per hour; per million tokens: {per_million}"


def name_baseline(name: str) -> str:
    return f"{name} (an estimate, no plan)" if name in ESTIMATES else name


def _baseline(plan: Plan, entry: PredictedTotals | str) -> str:
    if isinstance(entry, str):
        return f"none ({entry})"
    ours = plan.predicted.throughput_tokens_per_second
    theirs = entry.throughput_tokens_per_second
    ratio = f"{ours / theirs:.2f}x" if theirs else "any"
    return f"{format_number(theirs, 4)} tokens/s (ours {ratio}), loss {format_number(entry.quality_loss)}"
