"""HQQ's own forward: the reference, which supports everything everywhere.

It unpacks the whole weight, subtracts the zero and multiplies by the scale, each with a temporary of full size, and
then multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_llmpq.models.spec import DecoderSpec
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, count_packed_linear_bytes

# launches that HQQ's forward adds to a plain linear: mask, shift and copy for each part of a packed integer; subtract;
# multiply
_LAUNCHES = {8: 3, 4: 7, 3: 31, 2: 13, 1: 25}
# bytes moved per weight by mask, shift and copy (uint8 temporaries, int32 at 3 bits), without the final write
_UNPACK_BYTES = {8: 1.0, 4: 3.5, 3: 20.0, 2: 5.0, 1: 5.0}
# alive at once when HQQ multiplies by the scale: the unpacked weight, the difference, the product
_COPIES = 3


class Dequantize(Kernel):
    name = "dequantize"
    source = "counted from HQQ's code"

    def unsupported_reason(self, kind: str, dtype: str, quant: QuantConfig, spec: DecoderSpec | None) -> str | None:
        return self.unsupported_cache_reason(quant.kv_bits)

    def takes(self, out_features: int, in_features: int, bits: int, groups: Groups) -> bool:
        return bits != UNQUANTIZED_BITS

    def weight_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        return count_packed_linear_bytes(out_features, in_features, bits, groups, dtype_bytes)

    def read_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        return out_features * in_features * dtype_bytes

    def workspace_bytes(self, products: Sequence[tuple[int, int]], dtype_bytes: int) -> int:
        return _COPIES * max(out * into for out, into in products) * dtype_bytes

    def unpacking_bytes(self, weights: int, bits: int, dtype_bytes: int) -> float:
        return weights * (_UNPACK_BYTES[bits] + 5 * dtype_bytes)  # written, then twice read and written

    def extra_launches(self, bits: int) -> int:
        return _LAUNCHES[bits]


DEQUANTIZE = Dequantize()
