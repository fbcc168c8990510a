"""What is to be timed, and by which points: all of a workload's micro-batches, and lengths around its own. Imports no
torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_llmpq.cost.fit import FEWEST_POINTS
from ds_llmpq.cost.profile import Point, Setup
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.profiling.config import ProfilingConfig
from ds_llmpq.quant.config import QuantConfig


@dataclass(frozen=True)
class TimingTask:
    """What to measure. `sizes`: candidate micro-batches by phase; `bits`: widths the model can be stored in; `setup`:
    None while the kernel is not chosen yet; `captured`: decode passes on GPUs are timed as captured graphs."""

    path: str
    shape: ModelShape
    workload: WorkloadConfig
    quant: QuantConfig
    dtype: str
    bits: tuple[int, ...]
    sizes: dict[str, list[int]]
    setup: Setup | None = None
    captured: bool = False


@dataclass(frozen=True)
class ProfilingTask(TimingTask):
    """The same for `profile`. `kernel_note`: which kernel runs, and what it was chosen by."""

    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    kernel_note: Mapping[str, Any] = field(default_factory=dict)


_MOST_CHAIN_BYTES = 1 << 30  # of the layers timed together at one width


def limit_chain(layers: int, layer_bytes: float) -> int:
    """How many of `layers` decoder layers are timed one after another: fewer of large ones."""
    return max(1, min(layers, int(_MOST_CHAIN_BYTES // layer_bytes)))


def plan_points(
    device_type: str,
    bits: Sequence[int],
    sizes: dict[str, Sequence[int]],
    workload: WorkloadConfig,
) -> list[list[Point]]:
    """Points in groups of falling importance: what the planner will ask for, then what tells the effect of length.

    A group is timed round by round, all of its points in each, so that a slow drift of the machine hits all alike.
    sizes: candidate micro-batches by phase. The end parts (embed, head) are few and go with the first group.
    """
    groups: list[list[Point]] = [[], [], []]
    for phase in ("prefill", "decode"):
        for rank, length in enumerate(_list_lengths(phase, workload)):
            for width in bits:
                groups[min(rank, 2)] += [
                    Point(device_type, "layer", phase, width, size, length) for size in sizes[phase]
                ]
    prompt = workload.prompt_tokens
    ends = [Point(device_type, "embed", "prefill", 0, size, prompt) for size in fill_up(sizes["prefill"])]
    ends += [Point(device_type, "embed", "decode", 0, size, 1) for size in fill_up(sizes["decode"])]
    every = fill_up({*sizes["prefill"], *sizes["decode"]})
    ends += [Point(device_type, "head", "decode", 0, size, 1) for size in every]
    groups[0] += ends
    return [group for group in groups if group]


def fill_up(sizes: Iterable[int]) -> list[int]:
    """In order, and at least as many as a fit needs: double the largest, and so on."""
    filled = sorted(sizes)
    while len(filled) < FEWEST_POINTS:
        filled.append(2 * filled[-1])
    return filled


def _list_lengths(phase: str, workload: WorkloadConfig) -> list[int]:
    """The workload's own first. Decode: tokens cached, from the first to the last pass, the mean leading."""
    prompt, generated = workload.prompt_tokens, workload.generated_tokens
    if phase == "prefill":  # down to short ones: real prompts are seldom as long as the longest
        lengths = [prompt, prompt // 4, prompt // 16]
    else:
        # a second one far from it: else what grows with the context cannot be told from what grows with the rows
        lengths = [prompt + generated // 2, prompt // 4, prompt + generated - 2, prompt]
    return [length for length in dict.fromkeys(lengths) if length >= 1]
