"""Modules that run HQQ linears with a kernel library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hqq.core.quantize import HQQLinear
from torch import nn

from ds_llmpq.errors import UserError
from ds_llmpq.quant.kernels.base import Kernel, Product
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.linears import list_lm_head_products, resolve_kernel
from ds_llmpq.quant.packing import Groups
from ds_llmpq.quant.unpacked_weight import UnpackedWeight, stack, unpack


class KernelLinear(nn.Module):
    """A linear, or one of several with the same input, of which the first call multiplies for all."""

    def __init__(self, shared: _Shared, place: int, bias: torch.Tensor | None):
        super().__init__()
        self._shared, self._place = shared, place
        self.out_features = shared.sizes[place]
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)

    @property
    def held_bytes(self) -> int:
        """Bytes of the packed weight, counted by the first linear that shares it."""
        return self._shared.product.held_bytes if self._place == 0 else 0

    @property
    def compiles(self) -> bool:
        """Whether torch's compiler can call it."""
        return getattr(self._shared.product, "compiles", False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self._shared.outputs(self._place, inputs)
        return outputs if self.bias is None else outputs + self.bias


class RowBlocks(nn.Module):
    """One matrix in blocks of rows, without biases."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([block(inputs) for block in self.blocks], dim=-1)


class _Shared:
    """One product whose outputs several linears return, each once per input."""

    def __init__(self, product: Product, sizes: Sequence[int]):
        self.product, self.sizes = product, list(sizes)
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def outputs(self, place: int, inputs: torch.Tensor) -> torch.Tensor:
        if self._input is not inputs or place not in self._waiting:
            rows = self.product(inputs.reshape(-1, inputs.shape[-1]))
            parts = rows.view(*inputs.shape[:-1], -1).split(self.sizes, dim=-1)
            self._input, self._waiting = inputs, dict(enumerate(parts))
        found = self._waiting.pop(place)
        if not self._waiting:
            self._input = None
        return found


def explain_missing(kernel: Kernel, error: ImportError) -> UserError:
    return UserError(
        f"quant.kernel={kernel.name} needs {kernel.library}, which cannot be imported here ({error}); install it, or "
        f"use quant.kernel={DEQUANTIZE.name}."
    )


def build_product(kernel: Kernel, weight: UnpackedWeight, bits: int, dtype: torch.dtype) -> Product:
    """`weight` in the layout of `kernel`. `UserError`: its library is missing."""
    try:
        return kernel.build(weight, bits, dtype)
    except ImportError as error:
        raise explain_missing(kernel, error) from None


def build_linears(
    kernel: Kernel, linears: Sequence[HQQLinear], bits: int, groups: Groups, dtype: torch.dtype
) -> list[nn.Module]:
    """Replacements for linears of one input, computing in `dtype`; HQQ's own if `kernel` does not take them."""
    sizes, into = [linear.out_features for linear in linears], linears[0].in_features
    if resolve_kernel(kernel, sum(sizes), into, bits, groups) is DEQUANTIZE:
        return list(linears)
    product = build_product(kernel, stack([unpack(linear) for linear in linears]), bits, dtype)
    shared = _Shared(product, sizes)
    biases = [None if linear.bias is None else linear.bias.to(dtype) for linear in linears]
    return [KernelLinear(shared, place, bias) for place, bias in enumerate(biases)]


def build_lm_head(
    kernel: Kernel, blocks: Sequence[HQQLinear], bits: int, groups: Groups, dtype: torch.dtype
) -> nn.Module:
    """A quantized lm_head as one product if `kernel` takes it, else in blocks of rows; computes in `dtype`."""
    size = sum(block.out_features for block in blocks), blocks[0].in_features
    found, _ = list_lm_head_products(kernel, *size, bits, groups)
    if found is DEQUANTIZE:
        return RowBlocks(blocks)
    product = build_product(found, stack([unpack(block) for block in blocks]), bits, dtype)
    return KernelLinear(_Shared(product, [size[0]]), 0, None)
