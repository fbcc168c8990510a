"""Quantized products by torch's own packed 4-bit matrix product for CPUs, for machines without OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ds_llmpq.quant.kernels.base import SHARED_INPUTS, Kernel

if TYPE_CHECKING:
    import torch

    from ds_llmpq.quant.unpacked_weight import UnpackedWeight

_MIDDLE = 8  # torch's kernel takes codes from -8 to 7


class TorchInt4(Kernel):
    name = "torch_int4"
    source = "bytes counted from its layout"
    library = "torch"
    kinds = ("cpu",)
    dtypes = ("bfloat16",)
    storage_bits: ClassVar[Mapping[int, int]] = {1: 4, 2: 4, 3: 4, 4: 4}
    group_sizes = (32, 64, 128, 256)
    out_multiple = 16
    shared_inputs = SHARED_INPUTS

    def build(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype) -> TorchInt4Product:
        return TorchInt4Product(weight, bits)


class TorchInt4Product:
    """Multiplies bfloat16 inputs [rows, in] with a weight [out, in] of up to 4 bits; sums in float32."""

    def __init__(self, weight: UnpackedWeight, bits: int):
        import torch

        from ds_llmpq.quant.torch_cpu import packed_codes, packed_product

        # codes of fewer bits go to the middle of the range: what is left of the zero is then small, and exact enough
        raised = _MIDDLE - (1 << (bits - 1))
        self._multiply, self._group_size = packed_product, weight.group_size
        self._packed = packed_codes(weight.codes.int() + raised)
        # (code + raised - 8) x scale + (8 - raised - zero) x scale, [groups of a row, out, 2]
        both = torch.stack([weight.scale, (_MIDDLE - raised - weight.zero) * weight.scale], dim=-1)
        self._scales = both.transpose(0, 1).contiguous().bfloat16()
        self.held_bytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out], bfloat16."""
        return self._multiply(inputs.contiguous(), self._packed, self._group_size, self._scales)


TORCH_INT4 = TorchInt4()
