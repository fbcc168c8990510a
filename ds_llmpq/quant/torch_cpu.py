"""torch's private operations for CPUs, each by the name of what it does."""

from __future__ import annotations

import torch


def computes_in_bfloat16() -> bool:
    """Whether this processor's oneDNN does."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def reordered(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`weight` [out, in] in the layout that oneDNN multiplies `rows` rows of inputs with."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def reordered_product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """inputs [..., in] -> [..., out], of a `reordered` weight."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
