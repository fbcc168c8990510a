"""Predicted bytes against what HQQLinear really holds, and the packing gate against what HQQ really does."""

import random

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.packing import (
    PACKED_BITS,
    Groups,
    count_bits_per_weight,
    count_metadata_bytes,
    count_packed_linear_bytes,
    find_packing_problem,
    find_quantization_problem,
    make_groups,
)


def real_linear(out_features, in_features, bits, group_size, axis, dtype="float32"):
    """(HQQLinear, the weight it was made from)."""
    torch = pytest.importorskip("torch")
    quantize = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(out_features * 7919 + in_features)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
    config["weight_quant_params"]["optimize"] = False
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    weight = linear.weight.detach().clone()
    return quantize.HQQLinear(linear, config, compute_dtype=getattr(torch, dtype), device="cpu"), weight


def held_bytes(linear):
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (linear.W_q, *map(linear.meta.get, ("scale", "zero")))
    )


def random_cases(count, seed):
    generator = random.Random(seed)
    for _ in range(count):
        yield (
            generator.randrange(1, 40),
            generator.randrange(1, 12) * 8,
            generator.choice(PACKED_BITS),
            generator.choice((8, 16, 24, 64)),
            generator.choice((0, 1)),
        )


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_what_hqq_holds(bits, axis, dtype):
    """Odd shapes with group 8 make 3 bits pad in both directions; then ordinary ones."""
    for out_features, in_features, group_size in [
        (24, 40, 8),
        (56, 104, 8),
        (64, 256, 64),
        (96, 128, 128),
        (8, 72, 72),
    ]:
        if find_packing_problem(out_features, in_features, bits, group_size, axis):
            continue
        linear, _ = real_linear(out_features, in_features, bits, group_size, axis, dtype)
        dtype_bytes = {"float32": 4, "bfloat16": 2}[dtype]
        predicted = count_packed_linear_bytes(out_features, in_features, bits, Groups(group_size, axis), dtype_bytes)
        assert predicted == held_bytes(linear), (out_features, in_features, group_size)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_per_channel_are_what_hqq_holds(bits, dtype):
    """One scale and one zero a row, also where no group size divides it; 3 bits pad rows."""
    dtype_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    for out_features, in_features in [(24, 40), (56, 104), (64, 512), (8, 72)]:
        linear, _ = real_linear(out_features, in_features, bits, in_features, 1, dtype)
        predicted = count_packed_linear_bytes(out_features, in_features, bits, Groups(64, 1, (bits,)), dtype_bytes)
        assert predicted == held_bytes(linear), (out_features, in_features)
        assert linear.meta["scale"].numel() == out_features


def test_only_the_widths_named_have_per_channel():
    groups = make_groups(QuantConfig(per_channel_bits=[8, 3]))
    assert groups == Groups(64, 1, (3, 8))
    assert [groups.of(bits, 256) for bits in (2, 3, 4, 8)] == [64, 256, 64, 256]
    assert find_quantization_problem(64, 80, 8, groups) is None
    assert "80" in find_quantization_problem(64, 80, 4, groups)
    assert "group size 36 is not a positive multiple of 8" in find_quantization_problem(64, 36, 8, groups)


@pytest.mark.parametrize(
    ("per_channel_bits", "axis", "words"),
    [
        ([16], 1, r"quant\.per_channel_bits=\[16\]: list each width once, of 1, 2, 3, 4, 8"),
        ([8, 8], 1, "each width once"),
        ([5], 1, "each width once"),
        ([[8]], 1, "each width once"),
        (8, 1, "quant.per_channel_bits=8: list"),
        (None, 1, "quant.per_channel_bits=None: list"),
        ([8], 0, r"quant\.per_channel_bits=\[8\] needs groups along the input, not axis 0; set quant\.axis=1, or"),
    ],
)
def test_per_channel_that_cannot_be(per_channel_bits, axis, words):
    with pytest.raises(UserError, match=words):
        make_groups(QuantConfig(axis=axis, per_channel_bits=per_channel_bits))


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        (QuantConfig(group_size=0), "quant.group_size is 0 but must be at least 1"),
        (QuantConfig(axis=2), "quant.axis is 2 but must be 1"),
    ],
)
def test_groups_that_cannot_be(quant, words):
    with pytest.raises(UserError, match=words):
        make_groups(quant)


def test_gate_and_bytes_on_random_shapes():
    """Where the gate says yes, HQQ gives back the weight's shape and values; where it says no, it does not."""
    torch = pytest.importorskip("torch")
    seen = {True: 0, False: 0}
    for case in random_cases(300, seed=5):
        out_features, in_features, bits, *_ = case
        allowed = find_packing_problem(*case) is None
        seen[allowed] += 1
        try:
            linear, weight = real_linear(*case)
            restored = linear.dequantize()
            works = restored.shape == (out_features, in_features)
        except (AssertionError, RuntimeError, ValueError):
            works = False
        assert works == allowed, case
        if works:
            assert count_packed_linear_bytes(*case[:3], Groups(*case[3:]), dtype_bytes=4) == held_bytes(linear), case
            if bits == 8:
                torch.testing.assert_close(restored, weight, atol=0.02, rtol=0)
    assert min(seen.values()) > 40


def test_unquantized_is_the_plain_weight():
    assert count_packed_linear_bytes(48, 80, 16, Groups(), 2) == 48 * 80 * 2
    assert find_packing_problem(3, 5, 16, 64, 1) is None


def test_bits_a_weight_count_scales_zeros_rows_and_lm_head():
    """A layer of 4 x 64 x 64 + 3 x 64 x 128 weights and an lm_head of 640 x 64, in groups of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape = ModelShape.from_config({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 640, **sizes})
    layer, head, plain = 4 * 64 * 64 + 3 * 64 * 128, 640 * 64, Groups()
    assert count_bits_per_weight(shape, [16, 16], plain, 16) == 16
    assert count_bits_per_weight(shape, [4, 4], plain, 4) == 4.5  # 2 x 16 bits for 64 weights
    mixed = (layer * 4.5 + layer * 8.5 + head * 16) / (2 * layer + head)
    assert count_bits_per_weight(shape, [4, 8], plain, 16) == pytest.approx(mixed)
    rows = (8.5 * (layer - 64 * 128) + 8.25 * 64 * 128) / layer  # down_proj has rows of 128
    assert count_bits_per_weight(shape, [8, 8], Groups(64, 1, (8,)), 8) == pytest.approx(
        (2 * layer * rows + head * 8.5) / (2 * layer + head)
    )


def test_four_bits_by_hand():
    assert count_metadata_bytes(64, 128, 64, 2) == 2 * 128 * 2
    assert count_packed_linear_bytes(64, 128, 4, Groups(), 2) == 64 * 128 // 2 + 512


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ((64, 64, 5, 64, 1), "not a packed width"),
        ((64, 64, 4, 64, 2), "neither 0 nor 1"),
        ((64, 64, 4, 60, 1), "multiple of 8"),
        ((64, 64, 4, 0, 1), "multiple of 8"),
        ((3, 40, 4, 64, 1), "do not divide into groups"),
        ((3, 64, 4, 64, 1), "3 rows"),
    ],
)
def test_reasons(case, words):
    assert words in find_packing_problem(*case)
    with pytest.raises(UserError, match="cannot be packed"):
        count_packed_linear_bytes(*case[:3], Groups(*case[3:]), dtype_bytes=2)


def test_groups_must_not_straddle_rows():
    """96 x 80 weights divide into groups of 64, but neither side does."""
    for axis, side in ((1, "80"), (0, "96")):
        assert find_packing_problem(96, 80, 4, 64, axis) is None
        assert side in find_quantization_problem(96, 80, 4, Groups(64, axis))
        assert find_quantization_problem(96, 80, 4, Groups(16, axis)) is None
    assert find_quantization_problem(96, 80, 16, Groups()) is None
    assert "3 rows" in find_quantization_problem(3, 64, 4, Groups())
