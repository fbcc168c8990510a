"""The fast fine-tuning of zero points against HQQ's own, and that it never makes a group worse."""

import pytest
import torch
from hqq.core import optimize as hqq_optimize
from hqq.core.quantize import Quantizer

from ds_llmpq.quant import optimize
from ds_llmpq.quant.optimize import optimize_zeros, search_whole, use_optimizer


def weights(seed, rows=256, columns=512):
    """Rows of different sizes with a few outliers, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.05
    weight[torch.rand(rows, columns, generator=generator) < 0.002] *= 8
    return weight


def quantized(weight, bits, axis, optimizer):
    Quantizer.optimize_weights, previous = optimizer or Quantizer.optimize_weights, Quantizer.optimize_weights
    try:
        packed, meta = Quantizer.quantize(
            weight, bits, group_size=64, axis=axis, optimize=optimizer is not None, device="cpu"
        )  # fmt: skip
    finally:
        Quantizer.optimize_weights = previous
    return Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_keeps_at_least_nine_tenths_of_the_gain(bits, axis):
    weight = weights(bits)
    norm = {
        name: float((quantized(weight, bits, axis, optimizer) - weight).abs().pow(0.7).mean())
        for name, optimizer in {
            "none": None, "hqq": hqq_optimize.optimize_weights_proximal_legacy, "fast": optimize_zeros
        }.items()
    }  # fmt: skip
    assert norm["hqq"] < norm["none"]
    assert norm["none"] - norm["fast"] >= 0.9 * (norm["none"] - norm["hqq"])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_no_group_gets_worse_and_pieces_do_not_matter(axis, seed, monkeypatch):
    weight = weights(seed, 64, 64).reshape(-1, 32) * torch.randn(128, 1).exp()
    weight = weight if axis == 1 else weight.T.contiguous()
    low, high = weight.amin(axis, keepdim=True), weight.amax(axis, keepdim=True)
    scale = 7 / (high - low)
    zero = -low * scale

    def error(offset, levels):
        return ((levels - offset) / scale - weight).abs().mean(axis)

    levels, same_scale, found = optimize_zeros(weight, scale, zero, [0, 7], axis)
    plain = torch.round(weight * scale + zero).clamp(0, 7)
    assert torch.equal(levels, torch.round(weight * scale + found).clamp(0, 7))
    assert torch.equal(same_scale, scale)
    assert (error(found, levels) <= error(zero, plain) * (1 + 1e-5)).all()
    monkeypatch.setattr(optimize, "PIECE_WEIGHTS", 100)
    again = optimize_zeros(weight, scale, zero, [0, 7], axis)
    torch.testing.assert_close(again[2], found, rtol=1e-3, atol=1e-3)
    assert (again[0] != levels).float().mean() < 1e-3  # sums of other lengths round otherwise


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_whole_zeros_are_codes_and_beat_rounding(bits, axis, monkeypatch):
    weight, top = weights(bits, 64, 512).reshape(-1, 64), 2**bits - 1
    weight = weight if axis == 1 else weight.T.contiguous()
    low, high = weight.amin(axis, keepdim=True), weight.amax(axis, keepdim=True)
    plain = top / (high - low)
    codes, scale, zero = search_whole(weight, plain, -low * plain, [0, top], axis)
    rounded = (-low * plain).round()

    def error(codes, scale, zero):
        return ((codes - zero) / scale - weight).square().sum(axis)

    assert torch.equal(zero, zero.round().clamp(0, top))
    assert torch.equal(codes, codes.round().clamp(0, top))
    found, simple = error(codes, scale, zero), error((weight * plain + rounded).round().clamp(0, top), plain, rounded)
    assert (found <= simple * (1 + 1e-5)).all()
    assert found.sum() < (0.98 if bits < 8 else 1.0) * simple.sum()
    monkeypatch.setattr(optimize, "PIECE_WEIGHTS", 100)
    again = search_whole(weight, plain, -low * plain, [0, top], axis)
    torch.testing.assert_close(error(*again), found, rtol=1e-3, atol=0)


@pytest.mark.parametrize("values", [[0.0] * 8, [0.5] * 8, [-0.5] * 8, [0.3, 0.4] * 4, [1e-6, -1e-6] * 4])
def test_whole_zeros_of_odd_groups(values):
    """No range, or a range without zero."""
    weight = torch.tensor([values])
    codes, scale, zero = search_whole(weight, torch.ones(1, 1), torch.zeros(1, 1), [0, 15], 1)
    torch.testing.assert_close((codes - zero) / scale, weight, rtol=0.05, atol=1e-5)


def test_hqq_gets_its_own_optimizer_back():
    before = Quantizer.optimize_weights
    with use_optimizer(search_whole):
        assert Quantizer.optimize_weights is search_whole
    assert Quantizer.optimize_weights is before
