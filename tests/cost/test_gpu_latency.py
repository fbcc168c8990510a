"""The prior for GPUs against what was measured on one H200, to which it was fitted: an 8B model's decode steps and
products, and low bits in humming.

Measured with torch 2.11, CUDA 13.0, in bfloat16, on a virtual machine whose processor needs 12 to 16 us to launch an
operation. A step is 32 layers, embedding and lm_head, with a static cache, nothing fused.
"""

import pytest

from ds_llmpq import config
from ds_llmpq.cluster.cluster import device_type
from ds_llmpq.cost import products
from ds_llmpq.cost.latency import RooflineCosts
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.humming import HUMMING as KERNEL
from ds_llmpq.quant.packing import Groups

H200 = device_type("h200", config.read_device_types()["h200"])
SHAPE = ModelShape.from_config(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }
)  # fmt: skip
# (rows, context) -> milliseconds of a step as a graph, and launched by the host
STEPS = {(1, 256): (6.15, 13.1), (8, 256): (6.43, 12.5), (64, 256): (7.56, 13.3), (128, 512): (10.5, 12.5)}
# times as fast as bfloat16: 28672 x 4096, groups of 64
MEASURED = {
    4: {1: 2.00, 8: 2.06, 16: 1.86, 32: 1.40, 64: 1.53, 128: 1.24, 256: 0.95, 1024: 0.96},
    8: {1: 1.50, 8: 1.51, 16: 1.36, 32: 1.13, 64: 1.25, 128: 1.09, 256: 0.82, 1024: 0.85},
}


def step_seconds(costs, rows, context):
    layers = SHAPE.layers * costs.decode_seconds(16, rows, context - 1)
    return layers + costs.embed_seconds(rows, 1) + costs.head_seconds(rows)


@pytest.mark.parametrize(("rows", "context"), STEPS)
@pytest.mark.parametrize("captured", [True, False])
def test_steps_are_predicted_within_a_quarter(rows, context, captured):
    measured = STEPS[rows, context][0 if captured else 1]
    predicted = 1e3 * step_seconds(RooflineCosts(H200, SHAPE, "bfloat16", captured=captured), rows, context)
    assert predicted == pytest.approx(measured, rel=0.25)


def test_products_are_predicted_within_a_quarter():
    costs, weights = RooflineCosts(H200, SHAPE, "bfloat16"), 28672 * 4096
    assert costs.roof(2 * weights, 2 * weights) == pytest.approx(56.6e-6, rel=0.25)  # one row
    assert 2 * 4096 * weights / costs.roof(2 * 4096 * weights, 2 * weights) == pytest.approx(778e12, rel=0.25)


@pytest.mark.parametrize("bits", MEASURED)
def test_low_bits_gain_what_they_were_measured_to_gain(bits):
    """And no less with fewer rows, so that times grow with the work."""
    found = [products.layer_speedup(SHAPE, bits, KERNEL, Groups(), "cuda", rows) for rows in MEASURED[bits]]
    assert found == pytest.approx(list(MEASURED[bits].values()), rel=0.07)
    assert found == sorted(found, reverse=True)
    assert products.layer_speedup(SHAPE, bits, KERNEL, Groups(), "cpu", 1) is None
    assert products.layer_speedup(SHAPE, bits, DEQUANTIZE, Groups(), "cuda", 1) is None


def test_low_bits_gain_time_at_few_rows_and_none_at_many():
    costs = RooflineCosts(H200, SHAPE, "bfloat16", kernel=KERNEL, captured=True)
    assert costs.decode_seconds(4, 1, 256) < 0.75 * costs.decode_seconds(16, 1, 256)
    assert costs.decode_seconds(4, 256, 256) > costs.decode_seconds(16, 256, 256)
    lm_head = RooflineCosts(H200, SHAPE, "bfloat16", kernel=KERNEL, lm_head_bits=4, captured=True)
    assert lm_head.head_work(1) == pytest.approx(costs.head_work(1) / 2.0)


def test_launches_count_only_where_no_graph_runs():
    eager, captured = (RooflineCosts(H200, SHAPE, "bfloat16", captured=each) for each in (False, True))
    assert eager.decode_seconds(16, 1, 256) == pytest.approx(H200.kernel_overhead_seconds)
    assert captured.decode_seconds(16, 1, 256) < 0.5 * H200.kernel_overhead_seconds
    # prefill is launched by the host in any case, which is done before a long pass is
    assert captured.prefill_seconds(16, 1, 2) == eager.prefill_seconds(16, 1, 2) == H200.kernel_overhead_seconds
    assert captured.prefill_seconds(16, 8, 2048) == eager.prefill_seconds(16, 8, 2048)
