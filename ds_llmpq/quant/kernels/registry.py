"""The kernels there are, and which of them runs a setting.

HQQ quantizes; a kernel runs the very same codes, scales and zeros (`quant.kernel_linear`). Imports no torch: plans are
made from these objects alone. `docs/kernels.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_llmpq.errors import UserError
from ds_llmpq.models.spec import DecoderSpec
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.linears import saves_memory
from ds_llmpq.quant.kernels.openvino import OPENVINO, OPENVINO_GRAPH

AUTO = "auto"
# In the order of what measured fastest.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        OPENVINO_GRAPH,
        OPENVINO,
        DEQUANTIZE,
    )
}


# Kernels that are gone, and what runs in their place: named for one more version.
RETIRED = {"gemlite": DEQUANTIZE.name, "torch_int4": OPENVINO.name}


def find_kernel(name: str) -> Kernel:
    """`UserError` for a name that is no kernel's."""
    if name in RETIRED:
        raise UserError(
            f"kernel {name!r} is gone; use quant.kernel={RETIRED[name]} (or {AUTO}), and plan again. A run begun with "
            "it goes on with resume=force, and keeps its results."
        )
    if name not in KERNELS:
        raise UserError(f"kernel {name!r} is not known; use {AUTO} or one of {', '.join(KERNELS)}")
    return KERNELS[name]


def find_stage_kernel(name: str | None) -> Kernel:
    """The kernel of a plan's stage; `dequantize` where a plan names none, or one that nothing runs. `UserError`: one
    that is gone."""
    return find_kernel(name) if name in RETIRED else KERNELS.get(name, DEQUANTIZE)


def select_kernel(
    quant: QuantConfig,
    kinds: Sequence[str],
    dtype: str,
    linears: Sequence[tuple[str, int, int]] = (),
    measured: str | None = None,
    spec: DecoderSpec | None = None,
    batch_invariant: bool = False,
) -> QuantConfig:
    """`quant` with `auto` replaced by what will run on all of these device kinds.

    linears: those of one decoder layer. measured: the kernel that a profile found fastest. Without one, the first that
    takes this setting, whose library is installed here, and under which quantizing a layer still makes it smaller.
    batch_invariant: sums may not depend on which rows run together, so no whole stages. `UserError`: a kernel was asked
    for that cannot run so.
    """
    if quant.kernel != AUTO:
        kernel = find_kernel(quant.kernel)
        for kind in kinds:
            if reason := kernel.unsupported_reason(kind, dtype, quant, spec):
                raise UserError(f"quant.kernel={kernel.name} cannot be used: {reason}; set quant.kernel={AUTO}.")
        check_batch_invariant(kernel, batch_invariant)
        return quant
    usable = [find_kernel(measured)] if measured else _list_usable(dtype, linears)
    for kernel in usable:
        if batch_invariant and kernel.whole_stage:
            kernel = kernel.product_kernel
        if all(kernel.unsupported_reason(kind, dtype, quant, spec) is None for kind in kinds):
            return replace(quant, kernel=kernel.name)
    return replace(quant, kernel=DEQUANTIZE.name)


def list_candidates(
    kind: str,
    dtype: str,
    quant: QuantConfig,
    linears: Sequence[tuple[str, int, int]] = (),
    spec: DecoderSpec | None = None,
) -> list[Kernel]:
    """Kernels that could run here on this kind of device, `dequantize` last: what is worth measuring."""
    usable = _list_usable(dtype, linears)
    return [*(kernel for kernel in usable if not kernel.unsupported_reason(kind, dtype, quant, spec)), DEQUANTIZE]


def _list_usable(dtype: str, linears: Sequence[tuple[str, int, int]]) -> list[Kernel]:
    others = [kernel for kernel in KERNELS.values() if kernel is not DEQUANTIZE and kernel.is_usable(dtype)]
    return [kernel for kernel in others if saves_memory(kernel, linears)]


def check_batch_invariant(kernel: Kernel, batch_invariant: bool) -> None:
    """`UserError` for a kernel whose sums depend on which rows run together."""
    if batch_invariant and kernel.whole_stage:
        raise UserError(
            f"engine.batch_invariant=true cannot be had with quant.kernel={kernel.name}, whose sums depend on all "
            f"rows of a pass; plan with quant.kernel={kernel.product_kernel.name}."
        )
