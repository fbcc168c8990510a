"""Which kernel is fastest here: the linears of one decoder layer, timed on every kernel that could run them.

The choice is one kernel for all widths, for a stage's memory follows from it; what it loses where another is faster
(a width, many rows) is in the table that the profile keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.profiling.points import TimingTask
from ds_llmpq.profiling.profiler import list_local_types, open_timer
from ds_llmpq.profiling.timer import Timer
from ds_llmpq.quant.config import QuantConfig, resolve_zeros
from ds_llmpq.quant.hqq import quantize_linear
from ds_llmpq.quant.kernel_linear import build_linears
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.linears import group_linears, resolve_kernel
from ds_llmpq.quant.kernels.registry import AUTO, find_kernel, list_candidates, select_kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, make_groups

MOST_ROWS = 1024  # beyond it time is proportional to rows
_SHARE_SECONDS = 0.15  # for each kernel, width and number of rows


@dataclass(frozen=True)
class KernelTime:
    """Seconds of all linears of one decoder layer at `bits` (16: unquantized) for `rows` tokens."""

    kernel: str
    bits: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class KernelChoice:
    """The fastest kernel for a workload, and all times it was chosen by."""

    kernel: Kernel
    times: tuple[KernelTime, ...]

    def note(self) -> dict[str, Any]:
        """For a profile's header."""
        crossovers = {str(bits): self.crossover(bits) for bits in sorted({time.bits for time in self.times})}
        return {
            "kernel": self.kernel.label,
            "kernel_times": [asdict(time) for time in self.times],
            "dequantize_faster_from_rows": crossovers,
        }

    def crossover(self, bits: int) -> int | None:
        """Fewest of the timed rows from which on `dequantize` is faster than the choice; None where it never is."""
        mine, plain = (self._seconds(kernel.name, bits) for kernel in (self.kernel.product_kernel, DEQUANTIZE))
        slower = [rows for rows in sorted(mine) if rows in plain and plain[rows] < mine[rows]]
        return slower[0] if slower and self.kernel is not DEQUANTIZE else None

    def _seconds(self, kernel: str, bits: int) -> dict[int, float]:
        return {time.rows: time.seconds for time in self.times if (time.kernel, time.bits) == (kernel, bits)}


def settle_kernel(
    task: TimingTask, cluster: Cluster, profiled: str | None, batch_invariant: bool
) -> tuple[QuantConfig, dict[str, Any]]:
    """The HQQ settings with the kernel that will run, and a note on how it was chosen: the one asked for, the one that
    an interrupted profile began with (`profiled`), or the fastest on this host's first device."""
    kinds = sorted({device_type.kind for device_type in cluster.device_types.values()})

    def resolve(measured: str | None = None) -> QuantConfig:
        return select_kernel(
            task.quant, kinds, task.dtype, measured=measured, spec=task.shape.spec, batch_invariant=batch_invariant
        )

    if task.quant.kernel != AUTO:
        quant = resolve()
        return quant, {"kernel": find_kernel(quant.kernel).label}
    if profiled is not None:
        return resolve(profiled), {}
    with open_timer(list_local_types(cluster)[0]) as timer:
        choice = choose_kernel(task, timer)
    return resolve(choice.kernel.name), choice.note()


def choose_kernel(task: TimingTask, timer: Timer) -> KernelChoice:
    """Times the candidates on the timer's device."""
    shape, quant, bits, dtype = task.shape, task.quant, task.bits, task.dtype
    sizes, workload = task.sizes, task.workload
    able = list_candidates(timer.device.type, dtype, quant, shape.linears, shape.spec)
    stage = next((kernel for kernel in able if kernel.whole_stage), None)
    kernels = [kernel for kernel in able if not kernel.whole_stage]
    widths = [width for width in bits if width != UNQUANTIZED_BITS]
    if not (widths or stage) and quant.lm_head_bits != UNQUANTIZED_BITS:
        widths = [quant.lm_head_bits]  # what multiplies layers multiplies with lm_head
    if not widths or kernels == [DEQUANTIZE]:
        return KernelChoice(stage or DEQUANTIZE, ())  # no product of its own to be compared with
    prefill, decode = (sorted(sizes[phase])[len(sizes[phase]) // 2] for phase in ("prefill", "decode"))
    prompt_rows = min(MOST_ROWS, prefill * workload.prompt_tokens)
    rows = sorted({1, decode, prompt_rows})
    times = [time for kernel in kernels for time in _times(shape, quant, widths, dtype, timer, rows, kernel)]
    weights = {
        decode: workload.generated_tokens * workload.sequences / decode,
        prompt_rows: workload.prompt_tokens * workload.sequences / prompt_rows,
    }
    totals = {
        kernel: sum(weights.get(time.rows, 0.0) * time.seconds for time in times if time.kernel == kernel.name)
        for kernel in kernels
    }  # fmt: skip
    fastest = min(kernels, key=lambda kernel: totals[kernel])
    # the same products, with less around them
    return KernelChoice(stage if stage and stage.product_kernel is fastest else fastest, tuple(times))


@torch.inference_mode()
def _times(
    shape: ModelShape,
    quant: QuantConfig,
    widths: Sequence[int],
    dtype: str,
    timer: Timer,
    rows: Sequence[int],
    kernel: Kernel,
) -> list[KernelTime]:
    found = []
    for bits in widths:
        modules = _modules(shape, quant, bits, dtype, timer.device, kernel)
        for count in rows:
            seconds = 0.0
            for group, times in modules:
                inputs = torch.randn(count, group[0].in_features, dtype=getattr(torch, dtype), device=timer.device)
                action = _calls(group, inputs)
                seconds += times * median(timer.time(action, _SHARE_SECONDS / 2).median_seconds for _ in range(2))
            found.append(KernelTime(kernel.name, bits, count, seconds))
    return found


def _calls(group: Sequence[torch.nn.Module], inputs: torch.Tensor):
    return lambda: [linear(inputs) for linear in group]


def _modules(
    shape: ModelShape, quant: QuantConfig, bits: int, dtype: str, device: torch.device, kernel: Kernel
) -> list[tuple[list[torch.nn.Module], int]]:
    """(linears of one input, how often such a group occurs in a layer), with random weights."""
    quick, kinds = resolve_zeros(replace(quant, optimize=False), kernel.whole_zeros), {}
    groups = make_groups(quick)
    for group in group_linears(kernel, shape.linears, bits, groups):
        key = tuple(entry[1:3] for entry in group)
        kinds[key] = kinds.get(key, 0) + 1
    generator, found = torch.Generator().manual_seed(bits), []
    for key, times in kinds.items():
        out, into = sum(out for out, _ in key), key[0][1]
        by_kernel = resolve_kernel(kernel, out, into, bits, groups) is not DEQUANTIZE
        kept = torch.float32 if by_kernel else getattr(torch, dtype)
        weights = [torch.randn(*size, generator=generator) for size in key]
        linears = [quantize_linear(weight, None, bits, quick, kept, device) for weight in weights]
        modules = build_linears(kernel, linears, bits, groups, getattr(torch, dtype))
        for module, (_, in_features) in zip(modules, key, strict=True):
            module.in_features = in_features
        found.append((modules, times))
    return found
