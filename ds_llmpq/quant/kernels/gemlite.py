"""Quantized products by gemlite's Triton kernels on GPUs. Written after its documented interface; not measured."""

from __future__ import annotations

import torch
from gemlite.helper import A16Wn

from ds_llmpq.quant.kernels.registry import KERNELS
from ds_llmpq.quant.unpacked_weight import UnpackedWeight


class GemliteLinear:
    """Multiplies float16 or bfloat16 inputs [rows, in] with a weight [out, in] on the device of its codes."""

    def __init__(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype):
        self.out_features = weight.codes.shape[0]
        self._linear = A16Wn(device=str(weight.codes.device), dtype=dtype).from_weights(
            weight.codes,
            weight.scale.to(dtype).reshape(-1, 1),
            weight.zero.to(dtype).reshape(-1, 1),
            W_nbits=KERNELS["gemlite"].carried[bits],
            group_size=weight.group_size,
        )
        tensors = [*self._linear.parameters(), *self._linear.buffers()]
        self.held_bytes = sum(tensor.nbytes for tensor in tensors)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._linear(inputs)
