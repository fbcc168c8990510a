"""Unquantized linears of a CPU stage, in the layout in which oneDNN multiplies.

torch passes plain weights to oneDNN, which rearranges them in each call. Rearranging once makes passes of up to 32 rows
1.3 to 1.8 times faster; larger ones are as fast, and all outputs are bitwise the same.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS = 8  # the layout is chosen for so many rows, and is as good for others
_MULTIPLE = 64  # of outputs and inputs; other sizes would be padded and exceed the planned memory


class OneDnnLinear(nn.Module):
    """A linear with only the packed weight, which takes `held_bytes`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.held_bytes = linear.weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, _ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self.bias, "none", [], "")


def pack_linears(module: nn.Module) -> None:
    """Packs the linears of `module` that are in bfloat16, if the CPU's oneDNN supports it."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and _can_pack(child.weight):
            module.set_submodule(name, OneDnnLinear(child))


def _can_pack(weight: torch.Tensor) -> bool:
    whole = all(size % _MULTIPLE == 0 for size in weight.shape)
    return whole and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and computes_in_bfloat16()


def computes_in_bfloat16() -> bool:
    """Whether oneDNN does on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
