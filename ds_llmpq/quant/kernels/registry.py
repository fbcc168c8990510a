"""The available kernels, and the choice among them.

HQQ quantizes; a kernel runs the same codes, scales and zeros (`quant.kernel_linear`). Imports no torch, because plans
are made from these objects. `docs/kernels.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_llmpq.errors import UserError
from ds_llmpq.models.spec import DecoderSpec
from ds_llmpq.quant.config import QuantConfig, resolve_zeros
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.humming import HUMMING
from ds_llmpq.quant.kernels.linears import saves_memory
from ds_llmpq.quant.kernels.openvino import OPENVINO, OPENVINO_GRAPH
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

AUTO = "auto"
KV_BITS = (8, UNQUANTIZED_BITS)
# fastest first, as measured
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (OPENVINO_GRAPH, OPENVINO, HUMMING, DEQUANTIZE)}
# removed kernels and their replacements, reported for one more version
RETIRED = {"gemlite": HUMMING.name, "torch_int4": OPENVINO.name}


def find_kernel(name: str) -> Kernel:
    """`UserError`: unknown or removed."""
    if name in RETIRED:
        raise UserError(
            f"kernel {name!r} is gone; use quant.kernel={RETIRED[name]} (or {AUTO}), and plan again. A run begun with "
            "it goes on with resume=force, and keeps its results."
        )
    if name not in KERNELS:
        raise UserError(f"kernel {name!r} is not known; use {AUTO} or one of {', '.join(KERNELS)}")
    return KERNELS[name]


def find_stage_kernel(name: str | None) -> Kernel:
    """The kernel of a plan's stage; `dequantize` if the plan names none or an unknown one. `UserError`: a removed
    one."""
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
    """`quant` with `auto` replaced by the kernel that runs on all of these device kinds, and by the zeros that suit it.

    linears: those of one decoder layer. measured: the kernel that a profile found fastest; without it, the first that
    supports these settings, whose library is installed here, and with which quantizing still makes a layer smaller.
    batch_invariant: sums must not depend on which rows run together, so no whole stages. `UserError`: the requested
    kernel cannot run.
    """
    if quant.kv_bits not in KV_BITS:
        raise UserError(f"quant.kv_bits={quant.kv_bits}; it must be one of {', '.join(map(str, KV_BITS))}.")
    if quant.kernel != AUTO:
        kernel = find_kernel(quant.kernel)
        for kind in kinds:
            if reason := kernel.unsupported_reason(kind, dtype, quant, spec):
                raise UserError(f"quant.kernel={kernel.name} cannot be used: {reason}; set quant.kernel={AUTO}.")
        check_batch_invariant(kernel, batch_invariant)
        return resolve_zeros(quant, kernel.whole_zeros)
    if quant.kv_bits != UNQUANTIZED_BITS:
        linears = ()  # a smaller cache was asked for, whatever becomes of tiny layers
    usable = [find_kernel(measured)] if measured else _list_usable(dtype, linears)
    for kernel in usable:
        if batch_invariant and kernel.whole_stage:
            kernel = kernel.product_kernel
        if all(kernel.unsupported_reason(kind, dtype, quant, spec) is None for kind in kinds):
            return resolve_zeros(replace(quant, kernel=kernel.name), kernel.whole_zeros)
    if quant.kv_bits != UNQUANTIZED_BITS:
        raise UserError(
            f"quant.kv_bits={quant.kv_bits} needs kernel {OPENVINO_GRAPH.name}, which cannot run all of this here; set "
            f"quant.kv_bits={UNQUANTIZED_BITS}, or quant.kernel={OPENVINO_GRAPH.name} to see why."
        )
    return resolve_zeros(replace(quant, kernel=DEQUANTIZE.name), DEQUANTIZE.whole_zeros)


def explain_dequantize(quant: QuantConfig, kinds: Sequence[str], dtype: str) -> str | None:
    """Why GPUs would run the settings that `select_kernel` returned by `dequantize`; None if they do not."""
    if quant.kernel != DEQUANTIZE.name or "cuda" not in kinds or min(quant.bits) == UNQUANTIZED_BITS:
        return None
    reason = HUMMING.unsupported_reason("cuda", dtype, quant, None) or HUMMING.unusable_reason(dtype)
    if reason is None:
        return None
    return f"GPUs dequantize a weight for each product, which is slow; {HUMMING.name} is not used: {reason}"


def list_candidates(
    kind: str,
    dtype: str,
    quant: QuantConfig,
    linears: Sequence[tuple[str, int, int]] = (),
    spec: DecoderSpec | None = None,
) -> list[Kernel]:
    """Kernels that can run here on this kind of device, `dequantize` last: those worth measuring."""
    usable = _list_usable(dtype, linears)
    return [*(kernel for kernel in usable if not kernel.unsupported_reason(kind, dtype, quant, spec)), DEQUANTIZE]


def _list_usable(dtype: str, linears: Sequence[tuple[str, int, int]]) -> list[Kernel]:
    others = [kernel for kernel in KERNELS.values() if kernel is not DEQUANTIZE and kernel.is_usable(dtype)]
    return [kernel for kernel in others if saves_memory(kernel, linears)]


def check_batch_invariant(kernel: Kernel, batch_invariant: bool) -> None:
    """`UserError` if the kernel's sums depend on which rows run together."""
    if batch_invariant and kernel.whole_stage:
        raise UserError(
            f"engine.batch_invariant=true cannot be had with quant.kernel={kernel.name}, whose sums depend on all "
            f"rows of a pass; plan with quant.kernel={kernel.product_kernel.name}."
        )
