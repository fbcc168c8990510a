"""Quantized products by torch's own packed 4-bit matrix product for CPUs, for machines without OpenVINO."""

from __future__ import annotations

import torch

from ds_llmpq.quant.torch_cpu import packed_codes, packed_product
from ds_llmpq.quant.unpacked_weight import UnpackedWeight

_MIDDLE = 8  # torch's kernel takes codes from -8 to 7


class TorchInt4Linear:
    """Multiplies bfloat16 inputs [rows, in] with a weight [out, in] of up to 4 bits; sums in float32."""

    def __init__(self, weight: UnpackedWeight, bits: int):
        self.out_features, self.group_size = weight.codes.shape[0], weight.group_size
        # codes of fewer bits go to the middle of the range: what is left of the zero is then small, and exact enough
        raised = _MIDDLE - (1 << (bits - 1))
        self._packed = packed_codes(weight.codes.int() + raised)
        # (code + raised - 8) x scale + (8 - raised - zero) x scale, [groups of a row, out, 2]
        both = torch.stack([weight.scale, (_MIDDLE - raised - weight.zero) * weight.scale], dim=-1)
        self._scales = both.transpose(0, 1).contiguous().bfloat16()
        self.held_bytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out], bfloat16."""
        return packed_product(inputs.contiguous(), self._packed, self.group_size, self._scales)
