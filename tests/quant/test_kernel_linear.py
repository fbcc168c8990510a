"""Every kernel that is installed against HQQ's dequantized weights, and the modules that take a linear's place."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hqq.core.quantize import HQQLinear

from ds_llmpq.errors import UserError
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes, quantize_linear
from ds_llmpq.quant.kernel_linear import KernelLinear, build_linears, build_product
from ds_llmpq.quant.kernels.linears import resolve_kernel
from ds_llmpq.quant.kernels.registry import KERNELS
from ds_llmpq.quant.packing import Groups
from ds_llmpq.quant.unpacked_weight import stack, unpack

CPU = torch.device("cpu")
THERE = [name for name in ("openvino",) if importlib.util.find_spec(KERNELS[name].library)]
# relative error of products with normal inputs. openvino rounds inputs to 8 bits by groups: 0.006 as measured, and
# sums integers
TOLERANCE = {"openvino": 0.012}
# relative to the largest weight: single weights, read out with inputs that no kernel rounds
WEIGHT_TOLERANCE = {"openvino": 1e-6}
CASES = [
    (name, bits, size)
    for name in THERE
    for bits in KERNELS[name].storage_bits
    for size in (*KERNELS[name].group_sizes, *(["row"] if KERNELS[name].per_channel else []))
]  # fmt: skip


def quantized(out_features, in_features, bits, group_size=64, bias=None, seed=0, optimize=True, dtype=torch.float32):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) + 0.3
    quant = QuantConfig([bits], 64, 1, optimize and bits > 1, per_channel_bits=[bits], zeros="real")
    if group_size != "row":
        quant = replace(quant, group_size=group_size, per_channel_bits=[])
    return quantize_linear(0.02 * weight, bias, bits, quant, dtype, CPU)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, "row"])
def test_unpacked_is_what_hqq_dequantizes(bits, group_size):
    linear = quantized(48, 256, bits, group_size)
    assert torch.equal(unpack(linear).dequantize(), linear.dequantize())


@pytest.mark.parametrize(("name", "bits", "group_size"), CASES)
def test_products_are_those_of_the_dequantized_weight(name, bits, group_size):
    linear = quantized(80, 512, bits, group_size)
    weight = linear.dequantize()
    product = build_product(KERNELS[name], unpack(linear), bits, torch.bfloat16)
    for rows in (1, 7, 33, 100):
        inputs = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).bfloat16()
        expected = inputs.float() @ weight.t()
        found = product(inputs)
        assert found.shape == expected.shape
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= TOLERANCE[name] * expected.norm()


@pytest.mark.parametrize(("name", "bits", "group_size"), CASES)
def test_each_weight_is_the_same_number(name, bits, group_size):
    linear = quantized(32, 256, bits, group_size)
    weight, dtype = linear.dequantize(), torch.float32 if name == "openvino" else torch.bfloat16
    found = build_product(KERNELS[name], unpack(linear), bits, torch.bfloat16)(torch.eye(256, dtype=dtype)).float().t()
    assert (found - weight).abs().max() <= WEIGHT_TOLERANCE[name] * weight.abs().max()


@pytest.mark.parametrize("name", THERE)
def test_linears_of_one_input_give_what_they_give_alone(name):
    torch.manual_seed(0)
    biases = [None, torch.randn(32).bfloat16(), torch.randn(16).bfloat16()]
    linears = [quantized(size, 128, 4, bias=bias, seed=size) for size, bias in zip((64, 32, 16), biases, strict=True)]
    together = build_linears(KERNELS[name], linears, 4, Groups(), torch.bfloat16)
    alone = [build_linears(KERNELS[name], [linear], 4, Groups(), torch.bfloat16)[0] for linear in linears]
    assert all(isinstance(module, KernelLinear) for module in together)
    inputs = torch.randn(2, 3, 128).bfloat16()
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 2]):
        for place in order:
            assert torch.equal(together[place](inputs), alone[place](inputs))
    for _ in range(2):  # the same tensor with other numbers in it, as static buffers have
        inputs.normal_()
        for place in range(3):
            assert torch.equal(together[place](inputs), alone[place](inputs))


@pytest.mark.parametrize("name", THERE)
def test_inference_mode_and_plain_mode_mix(name):
    module = build_linears(KERNELS[name], [quantized(32, 64, 4)], 4, Groups(), torch.bfloat16)[0]
    inputs = torch.randn(3, 64).bfloat16()
    with torch.inference_mode():
        inside = module(inputs)
    assert torch.equal(module(inputs), inside)


@pytest.mark.parametrize("name", THERE)
def test_held_bytes_are_counted_once(name):
    linears = [quantized(size, 128, 4, bias=torch.zeros(size).bfloat16()) for size in (64, 32)]
    modules = torch.nn.ModuleList(build_linears(KERNELS[name], linears, 4, Groups(), torch.bfloat16))
    product = build_product(KERNELS[name], stack([unpack(linear) for linear in linears]), 4, torch.bfloat16)
    assert count_stored_bytes(modules) == product.held_bytes + 2 * (64 + 32)


def test_what_no_kernel_takes_stays_hqq_s():
    linear = quantized(64, 64, 2, dtype=torch.bfloat16)
    assert resolve_kernel(KERNELS["openvino_graph"], 64, 64, 2, Groups()).name == "dequantize"
    assert build_linears(KERNELS["openvino_graph"], [linear], 2, Groups(), torch.bfloat16) == [linear]
    assert isinstance(linear, HQQLinear)


@pytest.mark.parametrize("name", THERE)
def test_per_channel_stay_hqq_s_where_the_kernel_cannot_take_them(name):
    linear, groups = quantized(64, 512, 4, "row", dtype=torch.bfloat16), Groups(64, 1, (4,))
    (module,) = build_linears(KERNELS[name], [linear], 4, groups, torch.bfloat16)
    assert isinstance(module, KernelLinear if KERNELS[name].per_channel else HQQLinear)
    inputs = torch.randn(5, 512).bfloat16()
    expected = inputs.float() @ linear.dequantize().float().t()
    assert (module(inputs) - expected).norm() <= 0.015 * expected.norm()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ds_llmpq.quant.kernels.openvino_graph.single_product", None)
    with pytest.raises(UserError, match="kernel=openvino needs openvino"):
        build_product(KERNELS["openvino"], unpack(quantized(32, 64, 4)), 4, torch.bfloat16)


MEMORY = """
import re
import torch
from ds_llmpq.engine.device_memory import release_freed
from ds_llmpq.quant.kernel_linear import build_product
from ds_llmpq.quant.kernels.registry import KERNELS
from ds_llmpq.quant.unpacked_weight import UnpackedWeight

def anonymous():
    release_freed()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def product():
    codes = torch.randint(0, 16, (1024, 2048), dtype=torch.uint8)
    scale, zero = torch.rand(1024, 2048 // SIZE) + 1, 8 * torch.rand(1024, 2048 // SIZE)
    zero = zero.round() if WHOLE else zero
    made = build_product(KERNELS[NAME], UnpackedWeight(codes, scale, zero, SIZE), BITS, torch.bfloat16)
    made(torch.randn(64, 2048).bfloat16())
    return made

first = [product() for _ in range(3)]
before = anonymous()
more = [product() for _ in range(8)]
print((anonymous() - before) / sum(made.held_bytes for made in more))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize(("bits", "size", "whole"), [(4, 64, False), (4, 64, True), (8, 64, True), (8, 2048, False)])
def test_held_bytes_are_what_the_process_grows_by(name, bits, size, whole):
    if bits not in KERNELS[name].storage_bits:
        pytest.skip("runs through HQQ's own forward")
    code = f"NAME, BITS, SIZE, WHOLE = {name!r}, {bits}, {size}, {whole}\n{MEMORY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert 0.8 < float(done.stdout) < 1.15
