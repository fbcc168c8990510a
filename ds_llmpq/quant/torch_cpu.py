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


def packed_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 [out, in], int32, as `packed_product` wants them: two to a byte."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def packed_product(inputs: torch.Tensor, packed: torch.Tensor, group_size: int, scales: torch.Tensor) -> torch.Tensor:
    """inputs [rows, in] -> [rows, out], bfloat16, with the weight (code - 8) x scale + offset; `scales` holds scale and
    offset, [groups of a row, out, 2], bfloat16."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, group_size, scales)
