"""What a quantized linear costs beside its matrix product, by the kernel that runs it.

`dequantize`: HQQ's own forward. It unpacks the whole weight, subtracts the zero, multiplies by the scale (each a pass
over a temporary of full size) and multiplies. `fused`: a kernel that reads packed weights once and keeps the rest in
registers.
"""

from __future__ import annotations

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, packed_linear_bytes

KERNELS = ("dequantize", "fused")
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


def dequantize_bytes(shape: ModelShape, bits: int, dtype_bytes: int) -> float:
    """Bytes moved to unpack and dequantize all linears of one layer; 0 for unquantized ones."""
    if bits == UNQUANTIZED_BITS:
        return 0.0
    return shape.linear_weights * (_UNPACK_BYTES[bits] + 5 * dtype_bytes)  # written, then twice read and written


def weight_bytes_read(shape: ModelShape, bits: int, kernel: str, group_size: int, axis: int, dtype_bytes: int) -> int:
    """Bytes that the matrix products of one layer read: packed ones only where the kernel takes them packed."""
    if kernel == "dequantize" or bits == UNQUANTIZED_BITS:
        return shape.linear_weights * dtype_bytes
    return sum(
        packed_linear_bytes(linear.out_features, linear.in_features, bits, group_size, axis, dtype_bytes)
        for linear in shape.linears
    )


def launches_share(shape: ModelShape, bits: int, kernel: str) -> float:
    """Launches of a layer at `bits` over those of an unquantized layer."""
    if kernel != "dequantize" or bits == UNQUANTIZED_BITS:
        return 1.0
    return 1.0 + len(shape.linears) * DEQUANTIZE_LAUNCHES[bits] / LAYER_LAUNCHES
