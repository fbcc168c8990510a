"""Quantized products by gemlite's Triton kernels on GPUs. Written after its documented interface; not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ds_llmpq.quant.kernels.base import Kernel

if TYPE_CHECKING:
    import torch

    from ds_llmpq.quant.unpacked_weight import UnpackedWeight


class Gemlite(Kernel):
    name = "gemlite"
    source = "bytes counted from its layout"
    library = "gemlite"
    kinds = ("cuda",)
    dtypes = ("float16", "bfloat16")
    storage_bits: ClassVar[Mapping[int, int]] = {1: 1, 2: 2, 3: 4, 4: 4, 8: 8}
    group_sizes = (16, 32, 64, 128, 256)
    out_multiple = in_multiple = 32

    def build(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype) -> GemliteProduct:
        return GemliteProduct(weight, self.storage_bits[bits], dtype)


class GemliteProduct:
    """Multiplies float16 or bfloat16 inputs [rows, in] with a weight [out, in] on the device of its codes."""

    def __init__(self, weight: UnpackedWeight, storage_bits: int, dtype: torch.dtype):
        from gemlite.helper import A16Wn

        self._linear = A16Wn(device=str(weight.codes.device), dtype=dtype).from_weights(
            weight.codes,
            weight.scale.to(dtype).reshape(-1, 1),
            weight.zero.to(dtype).reshape(-1, 1),
            W_nbits=storage_bits,
            group_size=weight.group_size,
        )
        tensors = [*self._linear.parameters(), *self._linear.buffers()]
        self.held_bytes = sum(tensor.nbytes for tensor in tensors)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._linear(inputs)


GEMLITE = Gemlite()
