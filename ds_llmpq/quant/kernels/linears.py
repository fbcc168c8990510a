"""How a kernel runs the linears of a decoder layer and lm_head: which of them together, which not at all, and their
bytes."""

from __future__ import annotations

from collections.abc import Sequence

from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, cut_row_blocks


def resolve_kernel(kernel: Kernel, out_features: int, in_features: int, bits: int, groups: Groups) -> Kernel:
    """The kernel that runs a linear if `kernel` is chosen: `dequantize` for those it does not support."""
    return kernel if kernel.takes(out_features, in_features, bits, groups) else DEQUANTIZE


def group_linears(
    kernel: Kernel, linears: Sequence[tuple[str, int, int]], bits: int, groups: Groups
) -> list[list[tuple[str, int, int]]]:
    """Groups the linears (dotted name, out, in features) of a decoder layer as they run: those of one input
    together."""
    unquantized = bits == UNQUANTIZED_BITS
    if unquantized and not kernel.whole_stage:
        return [[linear] for linear in linears]
    together: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for linear in linears:
        parent, _, own = linear[0].rpartition(".")
        shared = next((str(names) for names in kernel.shared_inputs if own in names), own)
        able = unquantized or kernel.takes(linear[1], linear[2], bits, groups)
        together.setdefault((parent, shared if able else own), []).append(linear)
    return list(together.values())


def stack_features(group: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    """(out, in features) of the stacked weights of linears with one input."""
    return sum(linear[1] for linear in group), group[0][2]


def layer_bytes(
    kernel: Kernel, linears: Sequence[tuple[str, int, int]], bits: int, groups: Groups, dtype_bytes: int
) -> int:
    """Bytes of the weights of one decoder layer's linears at `bits`."""
    total = kernel.layer_overhead_bytes
    for group in group_linears(kernel, linears, bits, groups):
        size = stack_features(group)
        total += resolve_kernel(kernel, *size, bits, groups).weight_bytes(*size, bits, groups, dtype_bytes)
    return total


def list_lm_head_products(
    kernel: Kernel, out_features: int, in_features: int, bits: int, groups: Groups
) -> tuple[Kernel, list[tuple[int, int]]]:
    """The kernel for lm_head if `kernel` runs the layers, and (out, in features) of its products: a single one if a
    library supports it, else `cut_row_blocks`."""
    found = resolve_kernel(kernel.product_kernel, out_features, in_features, bits, groups)
    if found is not DEQUANTIZE:
        return found, [(out_features, in_features)]
    return found, [(rows, in_features) for rows in cut_row_blocks(out_features, in_features)]


def lm_head_bytes(
    kernel: Kernel, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int
) -> int:
    """Bytes of lm_head at `bits`."""
    found, products = list_lm_head_products(kernel, out_features, in_features, bits, groups)
    return sum(found.weight_bytes(*size, bits, groups, dtype_bytes) for size in products)


def saves_memory(kernel: Kernel, linears: Sequence[tuple[str, int, int]]) -> bool:
    """False if a layer at 4 bits would be larger than its plain weights, because of a kernel's overhead on tiny
    ones."""
    weights = sum(linear[1] * linear[2] for linear in linears)
    return not weights or layer_bytes(kernel, linears, 4, Groups(), 2) <= 2 * weights
