"""HQQ linears: quantizes a weight to a bit width, and restores a stored one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import nn

from ds_llmpq.errors import UserError
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.optimize import optimize_zeros, search_whole, use_optimizer
from ds_llmpq.quant.packing import cut_row_blocks, find_quantization_problem, make_groups

STORED_PARTS = ("W_q", "scale", "zero")


def quantize_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    quant: QuantConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> HQQLinear:
    """An `HQQLinear` of `weight` [out_features, in_features] at `bits`, computing in `dtype` on `device`. `UserError`:
    HQQ cannot pack this shape with the configured group size."""
    # HQQ silently drops weights if packed rows do not divide
    reason = find_quantization_problem(*weight.shape, bits, make_groups(quant))
    if reason:
        raise UserError(f"A {weight.shape[0]} x {weight.shape[1]} linear cannot be kept at {bits} bits: {reason}.")
    with use_optimizer(search_whole if quant.zeros == "whole" else optimize_zeros):
        return HQQLinear.from_weights(
            weight.to(device),
            None if bias is None else nn.Parameter(bias, requires_grad=False),
            quant_config=_hqq_config(bits, weight.shape[1], quant),
            compute_dtype=dtype,
            device=str(device),
        )


def quantize_rows(
    weight: torch.Tensor, bits: int, quant: QuantConfig, dtype: torch.dtype, device: torch.device
) -> list[HQQLinear]:
    """An lm_head as `cut_row_blocks` cuts it, each block a linear of its own."""
    blocks = weight.split(cut_row_blocks(*weight.shape))
    return [quantize_linear(block, None, bits, quant, dtype, device) for block in blocks]


def restore_linear(
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    bits: int,
    quant: QuantConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> HQQLinear:
    """The `HQQLinear` that `quantize_linear` made, from its stored `STORED_PARTS`; `shape` is [out, in] features."""
    linear = HQQLinear(
        None, quant_config=_hqq_config(bits, shape[1], quant), compute_dtype=dtype, device=str(device), initialize=False
    )
    packing = Quantizer.bit_to_packing[bits]
    linear.W_q = parts["W_q"]
    linear.meta = {
        "nbits": bits,
        "group_size": make_groups(quant).of(bits, shape[1]),
        "shape": torch.Size(shape),
        "scale": parts["scale"],
        "zero": parts["zero"],
        "axis": quant.axis,
        "packing": packing,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
    }
    linear.bias = bias
    linear.out_features, linear.in_features = shape
    linear.cuda(str(device))  # HQQ's name for placing and casting on any device
    linear.ready = True
    return linear


def split_parts(linear: HQQLinear) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, by the names under which they are stored."""
    return {"W_q": linear.W_q.data, "scale": linear.meta["scale"], "zero": linear.meta["zero"]}


def _hqq_config(bits: int, in_features: int, quant: QuantConfig) -> dict[str, Any]:
    group_size = make_groups(quant).of(bits, in_features)
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=quant.axis)
    params = config["weight_quant_params"]
    params["optimize"] = quant.optimize
    # HQQ would round zeros of 4 bits in any case, even before it optimizes them, with up to a tenth more KL in the end
    params["round_zero"] = quant.zeros == "whole" and not quant.optimize
    return config


def list_linears(layer: nn.Module) -> list[str]:
    """Dotted names of the linears in a decoder layer, in module order: those that are quantized."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def count_stored_bytes(module: nn.Module) -> int:
    """Bytes that the module's weights occupy: parameters, HQQ's scales, zeros and biases, and what a kernel library
    holds (`held_bytes`)."""
    total = 0
    seen: set[int] = set()

    def add(tensor: torch.Tensor | None) -> None:
        nonlocal total
        if tensor is not None and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()

    for parameter in module.parameters():
        add(parameter)
    for child in module.modules():
        if isinstance(child, HQQLinear):
            for tensor in (child.meta["scale"], child.meta["zero"], child.bias):
                add(tensor)
        total += getattr(child, "held_bytes", 0)
    return total
