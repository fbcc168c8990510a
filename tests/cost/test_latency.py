"""The roofline: counted work against a slow reference, and the shape that times must have."""

import dataclasses
import itertools

import pytest

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost import arithmetic
from ds_llmpq.cost.latency import OLDER_SHARES, RooflineCosts
from ds_llmpq.cost.products import layer_read_bytes
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels import registry
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import PACKED_BITS, Groups, count_packed_linear_bytes
from ds_llmpq.research.published_costs import KERNEL

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
SHAPE = ModelShape.from_config(LLAMA)
OPT_30B = ModelShape.from_config(
    {
        "model_type": "opt",
        "hidden_size": 7168,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "ffn_dim": 28672,
        "vocab_size": 50272,
    }
)
KERNELS = registry.KERNELS | {KERNEL.name: KERNEL}
V100 = DeviceType(
    "v100", "cuda", 1 << 34, 9e11, {"float16": 1.25e14}, 2e-4, (3, 4, 8, 16), "7.0", "datasheet: NVIDIA V100"
)
FLOPS_SHARE, BANDWIDTH_SHARE = OLDER_SHARES  # a V100's


def test_flops_are_what_torch_counts():
    """One decoder layer of the real model; torch's counter takes full scores, so past tokens stand in for causality."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    options = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = transformers.LlamaConfig(**options, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    sequences, tokens = 3, 20
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(sequences, tokens, dtype=torch.long), use_cache=False)
    full_scores = 4 * sequences * SHAPE.heads * SHAPE.head_dim * tokens * tokens
    predicted = 2 * (arithmetic.linear_flops(SHAPE, sequences * tokens) + full_scores)
    rotary = (
        2 * sequences * 0 + counter.get_total_flops() - predicted - arithmetic.head_flops(SHAPE, sequences * tokens)
    )
    assert 0 <= rotary <= 2 * sequences * SHAPE.head_dim * tokens  # positions x inverse frequencies is a matrix product


def test_causal_attention_equals_a_loop():
    for sequences, new, past in itertools.product((1, 3), (1, 2, 7), (0, 5)):
        seen = sum(past + token + 1 for token in range(new))
        assert arithmetic.attention_flops(SHAPE, sequences, new, past) == 4 * sequences * 256 * seen


def test_prefill_and_decode_count_the_same_attention():
    """Prefill of s tokens does the work of s decode steps."""
    steps = sum(arithmetic.attention_flops(SHAPE, 2, 1, past) for past in range(9))
    assert arithmetic.attention_flops(SHAPE, 2, 9, 0) == steps


def test_launches_are_those_that_hqq_makes():
    """Counted by running HQQ's forward: what it launches beyond a plain linear, views left out."""
    torch = pytest.importorskip("torch")
    quantize = pytest.importorskip("hqq.core.quantize")
    from torch.utils._python_dispatch import TorchDispatchMode

    views = ("slice", "view", "reshape", "t.default", "transpose", "detach", "empty", "alias", "_unsafe_view", "expand")

    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not any(view in str(function) for view in views):
                self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    for bits in PACKED_BITS:
        expected = DEQUANTIZE.extra_launches(bits)
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        config["weight_quant_params"]["optimize"] = False
        plain = torch.nn.Linear(64, 64, bias=False)
        linear = quantize.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
        inputs = torch.zeros(2, 64)
        with torch.no_grad(), Counter() as counter:
            linear(inputs)
        assert len(counter.names) - 1 == expected, (bits, counter.names)


def test_roofline_by_hand():
    """Prefill of OPT-30B on a V100 at 16 bits is bound by arithmetic: linears and causal attention."""
    costs = RooflineCosts(V100, OPT_30B, "float16")
    rows = 8 * 512
    flops = 2 * rows * 12 * 7168**2 + 4 * 8 * 7168 * 512 * 513 // 2
    elementwise = rows * 2 * (10 * 7168 + 2 * 28672)
    expected = flops / (0.6 * 1.25e14) + elementwise / (BANDWIDTH_SHARE * 9e11) + 2e-4
    assert costs.prefill_seconds(16, 8, 512) == pytest.approx(expected, rel=0.01)
    # published: 75.6 ms and 3.2 ms; a roofline must come within a third
    assert costs.prefill_seconds(16, 8, 512) == pytest.approx(75.6e-3, rel=0.33)
    assert costs.decode_seconds(16, 8, 512) == pytest.approx(3.2e-3, rel=0.33)


def test_measured_rates_are_taken_as_they_are():
    measured = dataclasses.replace(V100, source="measured: here")
    slow, fast = (RooflineCosts(kind, OPT_30B, "float16").prefill_seconds(16, 8, 512) for kind in (V100, measured))
    assert fast - 2e-4 == pytest.approx(FLOPS_SHARE * (slow - 2e-4), rel=0.05)


def test_width_that_the_device_cannot_run():
    costs = RooflineCosts(V100, SHAPE, "float16")
    assert costs.prefill_seconds(2, 1, 8) is costs.decode_seconds(2, 1, 8) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_times_grow_with_work(kernel):
    costs = RooflineCosts(V100, OPT_30B, "float16", kernel=KERNELS[kernel])
    for bits in (3, 4, 8, 16):
        prefill = [costs.prefill_seconds(bits, batch, 128) for batch in (1, 2, 8, 32)]
        decode = [costs.decode_seconds(bits, batch, 128) for batch in (1, 2, 8, 32)]
        longer = [costs.decode_seconds(bits, 8, past) for past in (1, 100, 1000)]
        for times in (prefill, decode, longer):
            assert times == sorted(times)
            assert times[0] < times[-1]
    assert costs.head_seconds(1) < costs.head_seconds(512)
    assert costs.embed_seconds(1, 1) < costs.embed_seconds(8, 512)


def test_fused_kernels_make_decode_faster_at_fewer_bits_and_dequantizing_slower():
    fused, plain = (RooflineCosts(V100, OPT_30B, "float16", kernel=kernel) for kernel in (KERNEL, DEQUANTIZE))
    fused_times = [fused.decode_seconds(bits, 1, 100) for bits in (3, 4, 8, 16)]
    assert fused_times == sorted(fused_times)
    assert all(plain.decode_seconds(bits, 1, 100) > plain.decode_seconds(16, 1, 100) for bits in (3, 4, 8))
    assert fused.decode_seconds(16, 1, 100) == plain.decode_seconds(16, 1, 100)


def test_per_channel_read_less_and_what_no_kernel_takes_is_dequantized():
    def seconds(kernel, bits, groups):
        return RooflineCosts(V100, OPT_30B, "float16", groups, KERNELS[kernel]).decode_seconds(bits, 8, 100)

    apart, whole = Groups(), Groups(64, 1, (8,))
    for kernel in ("fused", "openvino"):
        assert seconds(kernel, 8, whole) < seconds(kernel, 8, apart)
        assert seconds(kernel, 4, whole) == seconds(kernel, 4, apart)
    assert seconds("dequantize", 8, whole) == seconds("dequantize", 8, apart)


def test_fused_reads_exactly_the_packed_weights():
    packed = sum(count_packed_linear_bytes(n, k, 4, Groups(), 2) for _, n, k, *_ in SHAPE.linears)
    assert layer_read_bytes(SHAPE, 4, KERNEL, Groups(), 2) == packed
    assert layer_read_bytes(SHAPE, 4, DEQUANTIZE, Groups(), 2) == 2 * SHAPE.linear_weights


def test_an_lm_head_of_fewer_bits_reads_less_where_a_kernel_takes_it_and_is_dequantized_elsewhere():
    def moved(kernel, bits):
        costs = RooflineCosts(V100, OPT_30B, "float16", kernel=KERNELS[kernel], lm_head_bits=bits)
        return (costs.head_work(1) - RooflineCosts(V100, OPT_30B, "float16").head_work(1)) * bandwidth

    bandwidth = BANDWIDTH_SHARE * V100.memory_bandwidth_bytes_per_second
    weights = OPT_30B.vocab * OPT_30B.embed_dim
    assert moved("fused", 16) == 0
    # a scale and a zero of 2 bytes for 64 weights
    assert moved("fused", 8) == pytest.approx(weights * (1 + 4 / 64 - 2))
    assert moved("fused", 4) == pytest.approx(weights * (1 / 2 + 4 / 64 - 2))
    assert moved("dequantize", 8) == pytest.approx(weights * (1 + 5 * 2))
    layer = [RooflineCosts(V100, OPT_30B, "float16", lm_head_bits=bits).decode_seconds(4, 8, 100) for bits in (4, 16)]
    assert layer[0] == layer[1]
