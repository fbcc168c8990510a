"""Packed unquantized linears: the same outputs to the bit, no more bytes, and only where that holds."""

import pytest
import torch
from torch import nn

from ds_llmpq.integers import round_up_coarsely
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes, quantize_linear
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


@bf16
@torch.inference_mode()
def test_what_cannot_be_packed_is_padded():
    """Weights that would take more if packed, and HQQ's: the same outputs and bytes."""
    plain = [linear(100, 64, bias=True), linear(64, 100), quantize(linear(64, 64, bias=True))]
    module = nn.Sequential(*plain)
    before = count_stored_bytes(module)
    pack_linears(module)
    assert [type(child).__name__ for child in module] == ["PaddedLinear"] * 3
    assert count_stored_bytes(module) == before
    for child, kept in zip(module, plain, strict=True):
        for shape in ((1, 1), (2, 37), (3, 100)):
            inputs = torch.randn(*shape, kept.in_features).bfloat16()
            assert torch.equal(child(inputs), kept(inputs))


def quantize(linear):
    quant = QuantConfig(optimize=False)
    return quantize_linear(linear.weight.data, linear.bias.data, 4, quant, torch.bfloat16, torch.device("cpu"))


def test_what_is_something_else_stays():
    class Other(nn.Linear):
        """Not a plain linear."""

    module = nn.Sequential(linear(64, 64, dtype=torch.float32), Other(64, 64))
    kept = list(module)
    pack_linears(module)
    assert list(module) == kept


@bf16
@torch.inference_mode()
def test_few_numbers_of_rows_are_multiplied(monkeypatch):
    packed, met = OneDnnLinear(linear(64, 64)), set()
    multiply = OneDnnLinear._multiply
    monkeypatch.setattr(
        OneDnnLinear, "_multiply", lambda self, rows: met.add(tuple(rows.shape)) or multiply(self, rows)
    )
    for tokens in range(1, 300):
        for rows in (1, 3):
            assert packed(torch.randn(rows, tokens, 64).bfloat16()).shape == (rows, tokens, 64)
    assert met == {(round_up_coarsely(tokens), 64) for rows in (1, 3) for tokens in range(rows, 300 * rows, rows)}
    assert len(met) <= 16 + 14 + 3 * 16


def test_rounding_up_coarsely():
    assert [round_up_coarsely(value) for value in (1, 16, 17, 24, 25, 128, 129, 256, 257, 1025)] == [
        1, 16, 24, 24, 32, 128, 136, 256, 272, 1088,
    ]  # fmt: skip
    assert all(0 <= round_up_coarsely(value) / value - 1 <= 1 / 16 for value in range(113, 5000))
