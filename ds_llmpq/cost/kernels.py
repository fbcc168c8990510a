"""What a quantized linear costs beside its matrix product, by the kernel that runs it.

`dequantize`: HQQ's own forward. It unpacks the whole weight, subtracts the zero, multiplies by the scale (each a pass
over a temporary of full size) and multiplies. A library's kernel (`quant.kernels`) reads packed weights once and keeps
the rest in registers. `fused` stands for any such kernel in HQQ's own layout: for studies, nothing runs it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import Linear, ModelShape
from ds_llmpq.quant.kernels.registry import (
    DEQUANTIZE,
    NAMES,
    alone,
    grouped,
    layer_linear_bytes,
    lm_head_bytes,
    read_bytes,
    runs,
)
from ds_llmpq.quant.kernels.registry import KERNELS as LIBRARY_KERNELS
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, packed_linear_bytes

FUSED = "fused"
KERNELS = (*NAMES, FUSED)
# Launches that HQQ's forward adds to a plain linear (mask, shift and copy for each part of a packed integer; subtract;
# multiply), counted from its code, against about 40 of an unquantized decoder layer.
DEQUANTIZE_LAUNCHES = {8: 3, 4: 7, 3: 31, 2: 13, 1: 25}
LAYER_LAUNCHES = 40
# Bytes moved per weight by mask, shift and copy (uint8 temporaries, int32 at 3 bits), but for the write in the compute
# type.
_UNPACK_BYTES = {8: 1.0, 4: 3.5, 3: 20.0, 2: 5.0, 1: 5.0}
# Alive at once when HQQ multiplies by the scale: the unpacked weight, the difference, the product.
DEQUANTIZE_COPIES = 3


def check_kernel(kernel: str) -> str:
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r} is not known; use one of {', '.join(KERNELS)}")
    return kernel


def dequantizes(shape: ModelShape, bits: int, kernel: str, groups: Groups) -> bool:
    """True if linears at `bits` run through HQQ's own forward: by choice, or because `kernel` cannot take them.

    A kernel that takes only some shapes of a layer counts as one that takes none, for the largest is what matters.
    """
    return _dequantized(max(shape.linears, key=lambda linear: linear.weights), bits, kernel, groups)


def head_dequantizes(shape: ModelShape, bits: int, kernel: str, groups: Groups) -> bool:
    """The same of lm_head."""
    return _dequantized(shape.lm_head, bits, alone(kernel), groups)


def _dequantized(linear: Linear, bits: int, kernel: str, groups: Groups) -> bool:
    if bits == UNQUANTIZED_BITS or kernel == FUSED:
        return False
    return runs(kernel, linear.out_features, linear.in_features, bits, groups) == DEQUANTIZE


def linears_bytes(shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> int:
    """Bytes that the weights of one layer's linears take."""
    if kernel == FUSED:
        kernel = DEQUANTIZE  # in HQQ's layout
    return layer_linear_bytes(kernel, shape.linears, bits, groups, dtype_bytes)


def head_bytes(shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> int:
    """Bytes that lm_head takes."""
    _, out, into, _ = shape.lm_head
    if bits == UNQUANTIZED_BITS:
        return out * into * dtype_bytes
    return lm_head_bytes(DEQUANTIZE if kernel == FUSED else kernel, out, into, bits, groups, dtype_bytes)


def dequantize_bytes(shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> float:
    """Bytes moved to unpack and dequantize all linears of one layer; 0 where they are not."""
    if not dequantizes(shape, bits, kernel, groups):
        return 0.0
    return shape.linear_weights * _dequantize_bytes_a_weight(bits, dtype_bytes)


def head_dequantize_bytes(shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> float:
    """The same of lm_head."""
    if not head_dequantizes(shape, bits, kernel, groups):
        return 0.0
    return shape.lm_head.weights * _dequantize_bytes_a_weight(bits, dtype_bytes)


def _dequantize_bytes_a_weight(bits: int, dtype_bytes: int) -> float:
    return _UNPACK_BYTES[bits] + 5 * dtype_bytes  # written, then twice read and written


def weight_bytes_read(shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> int:
    """Bytes that the matrix products of one layer read: packed ones only where the kernel takes them packed."""
    if bits == UNQUANTIZED_BITS or dequantizes(shape, bits, kernel, groups):
        return shape.linear_weights * dtype_bytes
    return sum(_packed_bytes_read(linear, bits, kernel, groups, dtype_bytes) for linear in shape.linears)


def head_bytes_read(shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> int:
    """Bytes that the product with lm_head reads."""
    if bits == UNQUANTIZED_BITS or head_dequantizes(shape, bits, kernel, groups):
        return shape.lm_head.weights * dtype_bytes
    return _packed_bytes_read(shape.lm_head, bits, alone(kernel), groups, dtype_bytes)


def _packed_bytes_read(linear: Linear, bits: int, kernel: str, groups: Groups, dtype_bytes: int) -> int:
    out, into = linear.out_features, linear.in_features
    if kernel == FUSED:
        return packed_linear_bytes(out, into, bits, groups, dtype_bytes)
    return read_bytes(kernel, out, into, bits, groups.of(bits, into), dtype_bytes)


def arithmetic_dtype(
    shape: ModelShape, bits: int, kernel: str, groups: Groups, dtype: str, rates: Mapping[str, float]
) -> str:
    """The type whose rate bounds the products: int8 where the kernel rounds inputs and the device's rate is known."""
    integer = kernel in LIBRARY_KERNELS and LIBRARY_KERNELS[kernel].integer_activations
    if bits == UNQUANTIZED_BITS or not integer or dequantizes(shape, bits, kernel, groups) or "int8" not in rates:
        return dtype
    return "int8"


def launches_share(shape: ModelShape, bits: int, kernel: str, groups: Groups) -> float:
    """Launches of a layer at `bits` over those of an unquantized layer."""
    if bits == UNQUANTIZED_BITS or kernel == FUSED:
        return 1.0
    if dequantizes(shape, bits, kernel, groups):
        return 1.0 + len(shape.linears) * DEQUANTIZE_LAUNCHES[bits] / LAYER_LAUNCHES
    saved = len(shape.linears) - len(grouped(kernel, shape.linears, bits, groups))
    return 1.0 - saved / LAYER_LAUNCHES
