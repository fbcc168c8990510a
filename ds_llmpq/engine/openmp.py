"""How long threads of GNU OpenMP, under torch on Linux, stay awake for the next product. Imports no torch, which reads
it once, when it is imported.

Left alone they wait for milliseconds, as unquantized layers like it best. A kernel that multiplies with threads of its
own lacks the cores meanwhile: for one of these they wait for about 0.3 ms. docs/decisions.md has the measurements.
"""

from __future__ import annotations

import os

from ds_llmpq.plan import Plan
from ds_llmpq.quant.kernels.registry import find_stage_kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

VARIABLE, _BRIEFLY = "GOMP_SPINCOUNT", "10000"


def wait_briefly() -> None:
    """Unless the user has said how long."""
    os.environ.setdefault(VARIABLE, _BRIEFLY)


def wait_as_stage_needs(plan: Plan, rank: int) -> None:
    """As the layers of this rank's stage run best."""
    stage = next(stage for stage in plan.stages if stage.rank == rank)
    widths = [*stage.bits]
    if stage is plan.stages[-1]:
        widths.append(plan.lm_head_bits)
    quantized = any(bits < UNQUANTIZED_BITS for bits in widths)
    kernel = find_stage_kernel(stage.kernel)
    if kernel.own_threads and (kernel.whole_stage or quantized):
        wait_briefly()
