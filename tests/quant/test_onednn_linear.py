"""Packed unquantized linears: the same outputs to the bit, no more bytes, and only where that holds."""

import pytest
import torch
from torch import nn

from ds_llmpq.quant.hqq import count_stored_bytes
from ds_llmpq.quant.onednn_linear import OneDnnLinear, computes_in_bfloat16, pack_linears

bf16 = pytest.mark.skipif(not computes_in_bfloat16(), reason="this processor's oneDNN has no bfloat16")


def linear(out, into, bias=False, dtype=torch.bfloat16):
    torch.manual_seed(out + into)
    return nn.Linear(into, out, bias=bias).to(dtype)


@bf16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "into"), [(64, 64), (192, 128), (512, 1536), (1536, 512)])
@torch.inference_mode()
def test_outputs_are_the_same_to_the_bit(out, into, bias):
    plain = linear(out, into, bias)
    packed = OneDnnLinear(plain)
    for shape in ((1, 1), (3, 1), (8, 1), (33, 1), (2, 37), (4, 300)):
        inputs = torch.randn(*shape, into).bfloat16()
        assert torch.equal(packed(inputs), plain(inputs))
    turned = torch.randn(into, 5).bfloat16().t()  # not contiguous
    assert torch.equal(packed(turned), plain(turned))


@bf16
def test_bytes_are_those_of_the_plain_weight():
    module = nn.Sequential(linear(192, 128, bias=True), nn.LayerNorm(192).bfloat16(), linear(64, 192))
    before = count_stored_bytes(module)
    pack_linears(module)
    assert [type(child).__name__ for child in module] == ["OneDnnLinear", "LayerNorm", "OneDnnLinear"]
    assert count_stored_bytes(module) == before
    assert torch.ops.mkldnn._nbytes(module[0]._weight) == 192 * 128 * 2


def test_what_would_take_more_or_is_something_else_stays():
    class Other(nn.Linear):
        """Not a plain linear."""

    module = nn.Sequential(linear(100, 64), linear(64, 100), linear(64, 64, dtype=torch.float32), Other(64, 64))
    kept = list(module)
    pack_linears(module)
    assert list(module) == kept
