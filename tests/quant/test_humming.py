"""The kernel for GPUs, with a stand-in for its library: all but the call on the device. `scripts/bench/gpu.py` runs the
library itself against HQQ's dequantized weights."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import fake_humming
import pytest
import torch
from hqq.core.quantize import HQQLinear

from ds_llmpq.cluster.detect import Gpu
from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes, quantize_linear, quantize_rows
from ds_llmpq.quant.kernel_linear import KernelLinear, build_linears, build_lm_head, build_product
from ds_llmpq.quant.kernels import humming
from ds_llmpq.quant.kernels.humming import HUMMING, explain_capability
from ds_llmpq.quant.kernels.linears import layer_bytes, lm_head_bytes, resolve_kernel
from ds_llmpq.quant.kernels.registry import explain_dequantize, list_candidates, select_kernel
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import Groups
from ds_llmpq.quant.unpacked_weight import stack, unpack

CPU = torch.device("cpu")
BITS = tuple(HUMMING.storage_bits)
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"


@pytest.fixture
def library(monkeypatch):
    fake_humming.install(monkeypatch)
    monkeypatch.setattr(type(HUMMING), "version", "0.1.19")
    monkeypatch.setattr(type(HUMMING), "kinds", ("cpu", "cuda"))
    monkeypatch.setattr(humming, "_capabilities", list)
    return fake_humming


def quantized(out_features, in_features, bits, group_size=64, bias=None, seed=0) -> HQQLinear:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) + 0.3
    return quantize_linear(weight, bias, bits, QuantConfig([bits], group_size, 1, False), torch.float32, CPU)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", HUMMING.group_sizes)
def test_a_weight_keeps_its_codes_and_takes_the_bytes_that_are_planned(library, bits, group_size):
    weight = unpack(quantized(256, 384, bits, group_size))
    product = build_product(HUMMING, weight, bits, torch.bfloat16)
    assert torch.equal(library.unpack_weight(product.weight.data, bits), weight.codes.long())
    held = sum(tensor.nbytes for tensor in product.parameters())
    assert held == product.held_bytes == HUMMING.weight_bytes(256, 384, bits, Groups(group_size), 2)
    for rows in (1, 8, 9, 300, 5000):  # each asks another kernel, by its rows
        inputs = torch.randn(rows, 384).bfloat16()
        expected = inputs.float() @ weight.dequantize().t()
        found = product(inputs)
        assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_linears_of_one_input_are_one_product(library):
    biases = [torch.randn(size) for size in (256, 128, 128)]
    linears = [quantized(len(bias), 128, 4, bias=bias, seed=len(bias)) for bias in biases]
    modules = build_linears(HUMMING, linears, 4, Groups(), torch.bfloat16)
    assert all(isinstance(module, KernelLinear) for module in modules)
    assert [kernel["shape_n"] for kernel in library.HummingKernel.kernels[:1]] == [512]
    inputs = torch.randn(2, 3, 128).bfloat16()
    for module, linear in zip(modules, linears, strict=True):
        expected = inputs.float() @ linear.dequantize().t() + linear.bias
        assert (module(inputs) - expected).norm() < 0.01 * expected.norm()
    held = HUMMING.weight_bytes(512, 128, 4, Groups(), 2)
    assert count_stored_bytes(torch.nn.ModuleList(modules)) == held + 2 * 512
    assert stack([unpack(linear) for linear in linears]).codes.shape == (512, 128)


def test_lm_head_is_one_product(library):
    weight = torch.randn(384, 128)
    blocks = quantize_rows(weight, 8, QuantConfig(optimize=False), torch.float32, CPU)
    head = build_lm_head(HUMMING, blocks, 8, Groups(), torch.bfloat16)
    inputs = torch.randn(5, 128).bfloat16()
    expected = inputs.float() @ torch.cat([block.dequantize() for block in blocks]).t()
    assert (head(inputs) - expected).norm() < 0.01 * expected.norm()
    assert count_stored_bytes(head) == lm_head_bytes(HUMMING, 384, 128, 8, Groups(), 2)


@pytest.mark.parametrize(
    ("out_features", "in_features", "bits", "taken"),
    [(128256, 4096, 4, True), (4096, 14336, 3, True), (192, 128, 4, False), (128, 96, 4, False), (128, 64, 1, False)],
)
def test_what_it_does_not_take_is_dequantized(out_features, in_features, bits, taken):
    found = resolve_kernel(HUMMING, out_features, in_features, bits, Groups())
    assert found.name == ("humming" if taken else "dequantize")
    assert resolve_kernel(HUMMING, 128, 128, 8, Groups(64, per_channel_bits=(8,))).name == "dequantize"  # a group a row


def test_a_stage_is_compiled_before_it_is_loaded(library, monkeypatch):
    """Every shape and width once, lm_head too; what is loaded then finds its kernels."""
    monkeypatch.setattr(type(HUMMING), "unsupported_reason", lambda *arguments: None)
    quant = QuantConfig([4, 8, 16], 64, 1, False, "humming", lm_head_bits=8)
    loader = LayerLoader(Checkpoint(TINY), [4, 16, 8, *[16] * 5], quant, torch.bfloat16, CPU)
    from ds_llmpq.quant.kernels import humming_product

    monkeypatch.setattr(humming_product, "_QUIET_SECONDS", -1)
    told = []
    loader.compile_products(range(8), True, told.append)
    shapes = {(kernel["shape_n"], kernel["shape_k"], kernel["b_dtype"]) for kernel in library.HummingKernel.kernels}
    layer = [(512, 256), (256, 256), (1024, 256), (256, 512)]  # q k v; o; gate up; down
    assert shapes == {(*size, f"uint{bits}") for bits in (4, 8) for size in layer} | {(2048, 256, "uint8")}
    assert len(library.HummingKernel.kernels) == 8 * len(shapes)
    assert told[-1].startswith(
        f"humming compiles its kernels, once on this host: {len(shapes)} of {len(shapes)} shapes"
    )
    loaded = loader.decoder_layer(0)
    head = loader.head()
    assert len(library.HummingKernel.kernels) == 8 * len(shapes)
    sizes = [role[:3] for role in loader.decoder.spec.linears(0)]
    norms = 2 * 2 * 256
    assert count_stored_bytes(loaded) == layer_bytes(HUMMING, sizes, 4, Groups(), 2) + norms
    assert count_stored_bytes(head) == lm_head_bytes(HUMMING, 2048, 256, 8, Groups(), 2) + norms // 2


def test_without_the_library_the_plan_that_names_it_stops_with_the_remedy(monkeypatch):
    for name in ("humming", "humming.kernel.humming"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ds_llmpq.quant.kernels.humming_product", raising=False)
    monkeypatch.delattr("ds_llmpq.quant.kernels.humming_product", raising=False)
    monkeypatch.setattr(type(HUMMING), "unsupported_reason", lambda *arguments: None)
    quant = QuantConfig([4], 64, 1, False, "humming")
    loader = LayerLoader(Checkpoint(TINY), [4] * 8, quant, torch.bfloat16, CPU)
    remedy = r"quant.kernel=humming needs humming-kernels, .* or use quant.kernel=dequantize"
    with pytest.raises(UserError, match=remedy):
        loader.compile_products(range(8), False, print)
    with pytest.raises(UserError, match=remedy):
        loader.decoder_layer(0)
    assert "HUMMING_DISABLE_PARALLEL_BUILD" not in os.environ


def test_gpus_choose_it_where_it_can_run_and_a_plan_says_why_not(library, monkeypatch):
    assert select_kernel(QuantConfig([4]), ["cuda"], "bfloat16").kernel == "humming"
    assert HUMMING in list_candidates("cuda", "float16", QuantConfig())
    assert explain_dequantize(QuantConfig([4], kernel="humming"), ["cuda"], "bfloat16") is None
    refused = {
        "in float32": (QuantConfig([4]), "float32"),
        "axis 1": (QuantConfig([4], axis=0), "bfloat16"),
        "not of 256": (QuantConfig([4], group_size=256), "bfloat16"),
    }
    for words, (quant, dtype) in refused.items():
        found = select_kernel(quant, ["cuda"], dtype)
        assert found.kernel == "dequantize"
        assert words in explain_dequantize(found, ["cuda"], dtype)
    plain = QuantConfig([4], kernel="dequantize")
    monkeypatch.setattr(type(HUMMING), "version", None)
    assert "pip install 'ds_llmpq[cuda]'" in explain_dequantize(plain, ["cuda"], "bfloat16")
    assert explain_dequantize(plain, ["cpu"], "bfloat16") is None
    assert explain_dequantize(replace(plain, bits=[16]), ["cuda"], "bfloat16") is None


@pytest.mark.parametrize(
    ("capability", "dtype", "least"),
    [((7, 0), "float16", "7.5"), ((6, 0), "float16", "7.5"), ((7, 5), "bfloat16", "8.0"), ((7, 5), "float16", None),
     ((9, 0), "bfloat16", None), ((12, 0), "float16", None)],
)  # fmt: skip
def test_older_gpus_dequantize_and_are_told_so(library, monkeypatch, capability, dtype, least):
    reason = explain_capability(capability, dtype)
    assert (reason is None) == (least is None)
    monkeypatch.setattr(humming, "_capabilities", lambda: [(9, 0), capability])
    chosen = select_kernel(QuantConfig([4]), ["cuda"], dtype)
    assert chosen.kernel == ("humming" if least is None else "dequantize")
    if least is not None:
        assert f"compute capability {least} on" in explain_dequantize(chosen, ["cuda"], dtype)


def test_capabilities_are_those_that_nvidia_smi_names(monkeypatch):
    gpus = [Gpu(0, "0", "H200", 1, 1, "9.0"), Gpu(1, "1", "unknown", 1, 1, "[N/A]")]
    monkeypatch.setattr(humming, "query_gpus", lambda: gpus)
    assert humming._capabilities.__wrapped__() == [(9, 0)]
