"""The package's way to HQQ against HQQ's own constructor, and what is counted as stored."""

import copy
from dataclasses import replace

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn

from ds_llmpq.errors import UserError
from ds_llmpq.quant.config import QuantConfig, suit_zeros
from ds_llmpq.quant.hqq import count_stored_bytes, list_linears, quantize_linear
from ds_llmpq.quant.kernels.registry import select_kernel
from ds_llmpq.quant.packing import PACKED_BITS, Groups, count_packed_linear_bytes, make_groups
from ds_llmpq.quant.unpacked_weight import unpack

CPU = torch.device("cpu")


def quantized(linear, bits, dtype=torch.float32, group_size=32, axis=1):
    quant = QuantConfig(bits=[bits], group_size=group_size, axis=axis, optimize=False)
    bias = None if linear.bias is None else linear.bias.data
    return quantize_linear(linear.weight.data, bias, bits, quant, dtype, CPU)


def hqq_s_own(linear, bits, dtype=torch.float32, group_size=32, axis=1, **params):
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
    config["weight_quant_params"] |= {"optimize": False, "round_zero": False, **params}
    return HQQLinear(copy.deepcopy(linear), config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("zeros", ["whole", "real"])
@pytest.mark.parametrize("per_channel_bits", [[], [*PACKED_BITS]])
def test_zeros_are_of_the_kind_that_is_asked_for(optimize, zeros, per_channel_bits):
    """Without the optimizer too: so layers are timed."""
    quant = QuantConfig(optimize=optimize, zeros=zeros, per_channel_bits=per_channel_bits)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    linears = {bits: quantize_linear(weight, None, bits, quant, torch.float32, CPU) for bits in PACKED_BITS}
    whole = [bits for bits, linear in linears.items() if unpack(linear).has_whole_zeros]
    assert whole == ([*PACKED_BITS] if zeros == "whole" else [])
    assert make_groups(quant).zeros == zeros


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_same_as_hqq_s_own(bits, axis, dtype, bias):
    torch.manual_seed(bits)
    linear = nn.Linear(96, 64, bias=bias).to(dtype)
    ours, theirs = quantized(linear, bits, dtype, axis=axis), hqq_s_own(linear, bits, dtype, axis=axis)
    assert torch.equal(ours.W_q, theirs.W_q)
    inputs = torch.randn(5, 96, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(ours(inputs), theirs(inputs))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_per_channel_are_hqq_s_own_groups_of_that_size_and_zeros_suit_the_kernel():
    torch.manual_seed(2)
    linear, inputs = nn.Linear(96, 64), torch.randn(3, 96)
    for bits, group_size, zeros in ((8, 96, "real"), (8, 96, "whole"), (4, 32, "whole"), (3, 32, "auto")):
        quant = QuantConfig(group_size=32, optimize=False, per_channel_bits=[8], zeros=zeros)
        ours = quantize_linear(linear.weight.data, linear.bias.data, bits, quant, torch.float32, CPU)
        theirs = hqq_s_own(linear, bits, group_size=group_size, round_zero=zeros == "whole")
        assert torch.equal(ours(inputs), theirs(inputs))
        best = quantize_linear(linear.weight.data, None, bits, replace(quant, optimize=True), torch.float32, CPU)
        assert torch.equal(best.meta["zero"], best.meta["zero"].round()) == (zeros == "whole")
    for kernel, axis, zeros in (("openvino_graph", 1, "whole"), ("dequantize", 1, "real"), ("auto", 0, "real")):
        quant = QuantConfig(axis=axis, kernel=kernel)
        assert select_kernel(quant, ["cpu"], "bfloat16").zeros == zeros
        assert select_kernel(replace(quant, zeros="real"), ["cpu"], "bfloat16").zeros == "real"
    assert suit_zeros(QuantConfig(), "cpu").zeros == "whole"
    assert suit_zeros(QuantConfig(), "cuda:0").zeros == "real"
    with pytest.raises(UserError, match=r"quant.zeros='half' is not known; use auto, whole or real"):
        suit_zeros(QuantConfig(zeros="half"), "cpu")


def test_more_bits_are_nearer_the_weight():
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    errors = [(quantized(linear, bits).dequantize() - linear.weight).norm().item() for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.02 * linear.weight.norm().item() < errors[-1]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bytes_counts_everything_once(bits, dtype):
    """Packed weights, scales, zeros, bias and the unquantized rest; a tensor used twice counts once."""
    linear = nn.Linear(96, 64)
    norm = nn.LayerNorm(64).to(dtype)
    module = nn.ModuleList([quantized(linear, bits, dtype), norm, norm])
    tied = nn.LayerNorm(64, bias=False)
    tied.weight = nn.Parameter(norm.weight.data)
    module.append(tied)
    size = dtype.itemsize
    assert (
        count_stored_bytes(module)
        == count_packed_linear_bytes(64, 96, bits, Groups(32), size) + 64 * size + 2 * 64 * size
    )


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "words"),
    [
        ((64, 80), 4, 64, "64 x 80 linear cannot be kept at 4 bits: group size 64 does not divide"),
        ((3, 64), 4, 64, "3 x 64 linear cannot be kept at 4 bits: 3 rows"),
        ((64, 64), 4, 60, "multiple of 8"),
        ((64, 64), 5, 64, "5 bits is not a packed width"),
    ],
)
def test_what_cannot_be_packed_is_said(shape, bits, group_size, words):
    with pytest.raises(UserError, match=words):
        quantized(nn.Linear(shape[1], shape[0]), bits, group_size=group_size)


def test_linears_are_found_in_module_order():
    layer = nn.ModuleDict({"b": nn.Linear(2, 2), "n": nn.LayerNorm(2), "a": nn.Sequential(nn.ReLU(), nn.Linear(2, 2))})
    assert list_linears(layer) == ["b", "a.1"]
