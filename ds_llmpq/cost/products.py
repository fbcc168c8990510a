"""Work of the matrix products of a decoder layer and of lm_head beside their FLOPs, as the kernel says it."""

from __future__ import annotations

from collections.abc import Mapping

from ds_llmpq.models.shape import Linear, ModelShape
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.linears import group_linears, resolve_kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups

LAYER_LAUNCHES = 40  # of an unquantized decoder layer, about


def layer_kernel(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups) -> Kernel:
    """What runs a layer's linears at `bits`. A kernel that takes only some of their shapes counts by the largest,
    which is what matters."""
    largest = max(shape.linears, key=lambda linear: linear.weights)
    return resolve_kernel(kernel, largest.out_features, largest.in_features, bits, groups)


def layer_read_bytes(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, dtype_bytes: int) -> int:
    """Bytes that the matrix products of one layer read: packed ones only where the kernel takes them packed."""
    if bits == UNQUANTIZED_BITS:
        return shape.linear_weights * dtype_bytes
    found = layer_kernel(shape, bits, kernel, groups)
    return sum(_read_bytes(linear, bits, found, groups, dtype_bytes) for linear in shape.linears)


def lm_head_read_bytes(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, dtype_bytes: int) -> int:
    """Bytes that the product with lm_head reads."""
    if bits == UNQUANTIZED_BITS:
        return shape.lm_head.weights * dtype_bytes
    return _read_bytes(shape.lm_head, bits, _lm_head_kernel(shape, bits, kernel, groups), groups, dtype_bytes)


def layer_speedup(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, kind: str, rows: int) -> float | None:
    """How many times as fast as unquantized the products of one layer are, where that was measured."""
    return None if bits == UNQUANTIZED_BITS else layer_kernel(shape, bits, kernel, groups).speedup(kind, bits, rows)


def lm_head_speedup(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, kind: str, rows: int) -> float | None:
    """The same of lm_head."""
    return None if bits == UNQUANTIZED_BITS else _lm_head_kernel(shape, bits, kernel, groups).speedup(kind, bits, rows)


def layer_unpacking_bytes(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, dtype_bytes: int) -> float:
    """Bytes moved to unpack and dequantize all linears of one layer; 0 where they are not."""
    if bits == UNQUANTIZED_BITS:
        return 0.0
    return layer_kernel(shape, bits, kernel, groups).unpacking_bytes(shape.linear_weights, bits, dtype_bytes)


def lm_head_unpacking_bytes(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, dtype_bytes: int) -> float:
    """Bytes moved to unpack and dequantize lm_head; 0 where it is not."""
    if bits == UNQUANTIZED_BITS:
        return 0.0
    found = _lm_head_kernel(shape, bits, kernel, groups)
    return found.unpacking_bytes(shape.lm_head.weights, bits, dtype_bytes)


def product_dtype(
    shape: ModelShape, bits: int, kernel: Kernel, groups: Groups, dtype: str, rates: Mapping[str, float]
) -> str:
    """The type whose rate bounds the products: int8 where the kernel rounds inputs and the device's rate is known."""
    if bits == UNQUANTIZED_BITS or "int8" not in rates:
        return dtype
    return "int8" if layer_kernel(shape, bits, kernel, groups).integer_activations else dtype


def launches_share(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups) -> float:
    """Launches of a layer at `bits` over those of an unquantized layer."""
    if bits == UNQUANTIZED_BITS:
        return 1.0
    found = layer_kernel(shape, bits, kernel, groups)
    saved = len(shape.linears) - len(group_linears(found, shape.linears, bits, groups))
    return 1.0 + (len(shape.linears) * found.extra_launches(bits) - saved) / LAYER_LAUNCHES


def _lm_head_kernel(shape: ModelShape, bits: int, kernel: Kernel, groups: Groups) -> Kernel:
    matrix = shape.lm_head
    return resolve_kernel(kernel.product_kernel, matrix.out_features, matrix.in_features, bits, groups)


def _read_bytes(linear: Linear, bits: int, kernel: Kernel, groups: Groups, dtype_bytes: int) -> int:
    return kernel.read_bytes(linear.out_features, linear.in_features, bits, groups, dtype_bytes)
