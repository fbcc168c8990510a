"""Pictures of a plan and its run: bits by layer, memory by part against the budget, time by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_llmpq.plan import MEMORY_PARTS, Plan
from ds_llmpq.report import figures
from ds_llmpq.report.plan_table import name_baseline
from ds_llmpq.wording import format_number, format_size

GIB, MIB = 2**30, 2**20


def plot_bits(plan: Plan, path: Path) -> Path:
    """One bar per layer, as high as its bit width, in the colour of its stage."""
    layers = plan.stages[-1].layers[1]
    figure, ((axis,),) = figures.make_figure(width=11, height=2.6)
    for index, stage in enumerate(plan.stages):
        place = range(*stage.layers)
        label = f"stage {index}: {stage.device} ({stage.device_type})"
        axis.bar(place, stage.bits, width=0.9, color=figures.STAGES[index % len(figures.STAGES)], label=label)
        if layers <= 64:
            for layer, width in zip(place, stage.bits, strict=True):
                axis.text(layer, width, str(width), ha="center", va="bottom", fontsize=7)
    axis.set(xlim=(-0.7, layers - 0.3), ylim=(0, 19), xlabel="decoder layer", ylabel="bits")
    axis.legend(
        ncols=min(len(plan.stages), 4), loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False, fontsize=8
    )
    return figures.save_figure(figure, path)


def plot_memory(plan: Plan, measured: Sequence[Mapping[str, Any]] | None, path: Path) -> Path:
    """Predicted parts of each stage, the measured ones beside them, and a line at the budget, or its figure above where
    it is many times what is needed."""
    top = 1.3 * max(stage.memory_bytes.total for stage in plan.stages)
    far = [stage.memory_budget_bytes > 3 * top for stage in plan.stages]
    budgets = [stage.memory_budget_bytes for stage, above in zip(plan.stages, far, strict=True) if not above]
    largest = max([top, *budgets])
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    figure, ((axis,),) = figures.make_figure(width=max(6.0, 1.5 * len(plan.stages) + 3), height=3.8)
    for index, stage in enumerate(plan.stages):
        bottom = 0.0
        for part in MEMORY_PARTS:
            value = getattr(stage.memory_bytes, part) / unit
            axis.bar(index - 0.18, value, 0.34, bottom, color=figures.PARTS[part], label=part if index == 0 else None)
            bottom += value
        if far[index]:
            text = f"budget {format_size(stage.memory_budget_bytes)}"
            axis.text(index, largest / unit, text, ha="center", va="top", fontsize=8)
            continue
        budget, label = stage.memory_budget_bytes / unit, None if index != far.index(False) else "budget"
        axis.plot([index - 0.42, index + 0.42], [budget] * 2, color="black", lw=1.6, label=label)
    for index, held in enumerate(measured or []):
        bottom = 0.0
        for part in ("weights", "kv"):  # weights: with embedding and head
            value = float(held.get(part) or 0) / unit
            axis.bar(index + 0.2, value, 0.3, bottom, color=figures.PARTS[part], alpha=0.55, hatch="//", ec="white")
            bottom += value
    if measured:
        axis.bar(
            [0], [0], color="#888888", alpha=0.55, hatch="//", ec="white", label="measured (weights with ends, kv)"
        )
    axis.set_xticks(
        range(len(plan.stages)), [f"{i}\n{stage.device}" for i, stage in enumerate(plan.stages)], fontsize=8
    )
    axis.set(ylabel=name, xlabel="stage", xlim=(-0.6, len(plan.stages) - 0.4), ylim=(0, 1.05 * largest / unit))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figures.save_figure(figure, path)


def plot_phases(stages: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Where the time of each stage went: work by phase, then waiting. `stages`: seconds by span name for each stage."""
    names = sorted({name for entry in stages for name in entry}, key=lambda name: (name.startswith("wait_"), name))
    figure, ((axis,),) = figures.make_figure(width=9, height=0.45 * len(stages) + 1.6)
    left = [0.0] * len(stages)
    for name in names:
        values = [float(entry.get(name, 0.0)) for entry in stages]
        axis.barh(
            range(len(stages)),
            values,
            left=left,
            color=figures.SPANS.get(name, figures.OTHER),
            label=figures.name_span(name),
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_yticks(range(len(stages)), [f"stage {index}" for index in range(len(stages))])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False, fontsize=8)
    return figures.save_figure(figure, path)


def plot_predicted_phases(plan: Plan, path: Path) -> Path:
    """For a plan that was not run: seconds that each stage works on a whole batch, by phase."""
    sequences, steps = plan.workload.sequences, plan.workload.generated_tokens - 1
    sizes = {"prefill": plan.micro_batch.prefill, "decode": plan.micro_batch.decode}
    rounds = {phase: -(-sequences // size) for phase, size in sizes.items()}
    return plot_phases(
        [
            {
                "prefill": stage.prefill_seconds * rounds["prefill"],
                "decode": stage.decode_seconds * rounds["decode"] * steps,
            }
            for stage in plan.stages
        ],
        path,
    )


def plot_baselines(plan: Plan, path: Path) -> Path | None:
    """Predicted tokens/s of the plan and of its baselines; None if no baseline has a plan."""
    found = {
        name_baseline(name): entry.throughput_tokens_per_second
        for name, entry in plan.baselines.items()
        if not isinstance(entry, str)
    }
    if not found:
        return None
    found = {"this plan": plan.predicted.throughput_tokens_per_second, **found}
    figure, ((axis,),) = figures.make_figure(width=8, height=0.35 * len(found) + 1.1)
    colours = [figures.STAGES[0], *("#BFBFBF" for _ in range(len(found) - 1))]
    bars = axis.barh(list(found), list(found.values()), color=colours)
    axis.bar_label(bars, [format_number(value) for value in found.values()], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("predicted tokens/s")
    figures.write_plainly(axis.xaxis)
    return figures.save_figure(figure, path)
