"""What is to be timed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_llmpq.cost.profile import Setup
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
