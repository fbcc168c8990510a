"""Linears of a CPU stage in bfloat16, as oneDNN multiplies best.

torch passes plain weights to oneDNN, which rearranges them in each call. Rearranging once makes passes of up to 32 rows
1.3 to 1.8 times faster; larger ones are as fast, and all outputs are bitwise the same.

oneDNN makes kernels for each number of rows that it meets, which takes 3 to 5 ms a pass the first time, and keeps some
(`onednn_kernels`). Rows are padded to few numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hqq.core.quantize import HQQLinear
from torch import nn

from ds_llmpq.integers import round_up_coarsely

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
        return multiply_padded(self._multiply, inputs)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")


class PaddedLinear(nn.Module):
    """A linear of another kind that oneDNN multiplies."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return multiply_padded(self.linear, inputs)


def multiply_padded(multiply: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """[..., in features] -> [..., out features] by `multiply`, which gets two dimensions: padded rows."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    padding = round_up_coarsely(len(rows)) - len(rows)
    outputs = multiply(F.pad(rows, (0, 0, 0, padding)) if padding else rows)
    return outputs[: len(rows)].view(*inputs.shape[:-1], -1)


def pack_linears(module: nn.Module) -> None:
    """Packs the linears of `module` that are in bfloat16, if the CPU's oneDNN supports it, and pads the rows of those
    that cannot be packed, HQQ's among them."""
    if not computes_in_bfloat16():
        return
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and _is_in_bfloat16(child.weight):
            whole = all(size % _MULTIPLE == 0 for size in child.weight.shape)
            module.set_submodule(name, OneDnnLinear(child) if whole else PaddedLinear(child))
        elif isinstance(child, HQQLinear) and child.compute_dtype == torch.bfloat16 and child.W_q.device.type == "cpu":
            module.set_submodule(name, PaddedLinear(child))


def _is_in_bfloat16(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def computes_in_bfloat16() -> bool:
    """Whether oneDNN does on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
