"""Private and undocumented parts of HQQ."""

import inspect
import subprocess
import sys

import pytest
import torch
from contract_checks import parameters, takes

LIBRARY = "hqq"
SEEN = ("0.2.8", "0.2.8.post1")

BITS = (8, 4, 3, 2)


def test_optimizer_is_a_class_attribute(monkeypatch):
    """`Quantizer.optimize_weights`, in quant/optimize.py: a class attribute that `Quantizer.quantize` calls with
    keywords (tensor, scale, zero, min_max, axis, device); replaced while we quantize."""
    from hqq.core.quantize import Quantizer

    calls = []

    def optimize(**given):
        calls.append(set(given))
        return (
            (given["tensor"] * given["scale"] + given["zero"]).round().clamp(*given["min_max"]),
            given["scale"],
            given["zero"],
        )

    assert "optimize_weights" in Quantizer.__dict__
    monkeypatch.setattr(Quantizer, "optimize_weights", optimize)
    Quantizer.quantize(torch.randn(8, 64), nbits=4, group_size=32, axis=1, device="cpu")
    assert calls == [{"tensor", "scale", "zero", "min_max", "axis", "device"}]


def test_step_of_the_optimizer():
    """`optimize_weights_proximal_legacy_step`, in quant/optimize.py: takes (weight, scale, zero, min_max, beta, norm,
    axis), returns (restored weight, codes, next zero, scale)."""
    from hqq.core.optimize import optimize_weights_proximal_legacy_step as step

    assert parameters(step) == ["W_f", "scale", "zero", "min_max", "beta", "lp_norm", "axis"]
    weight, scale, zero = torch.randn(4, 32), torch.full((4, 1), 3.0), torch.full((4, 1), 8.0)
    restored, codes, following, same = step(weight, scale, zero, [0, 15], 10.0, 0.7, 1)
    assert torch.equal(codes, (weight * scale + zero).round().clamp(0, 15))
    assert torch.equal(restored, (codes - zero) / scale)
    assert following.shape == zero.shape
    assert torch.equal(same, scale)


def test_constants_of_the_optimizer():
    """`_P, _BETA, _KAPPA`, in quant/optimize.py: copies of the defaults that HQQ's own optimizer runs with."""
    from hqq.core.optimize import optimize_weights_proximal

    from ds_llmpq.quant import optimize

    defaults = inspect.signature(optimize_weights_proximal).parameters["opt_params"].default
    assert (defaults["lp_norm"], defaults["beta"], defaults["kappa"]) == (optimize._P, optimize._BETA, optimize._KAPPA)


@pytest.mark.parametrize("bits", BITS)
def test_packings(bits):
    """`Quantizer.bit_to_packing`, in quant/hqq.py: with `unpack_view_dtype`, the packing of each width and the type it
    is stored in."""
    from hqq.core.quantize import Quantizer

    packing = Quantizer.bit_to_packing[bits]
    packed, meta = Quantizer.quantize(torch.randn(32, 64), nbits=bits, group_size=64, axis=1, device="cpu")
    assert meta["packing"] == packing
    assert packed.dtype == meta["unpack_view_dtype"] == Quantizer.unpack_view_dtype[packing]


@pytest.mark.parametrize("bits", BITS)
def test_unpacking(bits):
    """`Quantizer.unpack`, in quant/unpacked_weight.py: {packing: function of (packed codes, dtype)}, which gives
    codes back, groups in rows, at 3 bits with rows added behind."""
    from hqq.core.quantize import Quantizer

    weight = torch.randn(32, 64)
    packed, meta = Quantizer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu", optimize=False)
    codes = Quantizer.unpack[meta["packing"]](packed, dtype=torch.uint8)[:32]
    assert codes.dtype == torch.uint8
    expected = (weight / meta["scale"] + meta["zero"]).round().clamp(0, 2**bits - 1)
    assert (codes.float() - expected).abs().max() <= 1  # the division may round the other way
    assert torch.equal(codes.float().sub(meta["zero"]).mul(meta["scale"]), Quantizer.dequantize(packed, meta).float())


@pytest.mark.parametrize("bits", BITS)
def test_layers_put_together_from_stored_parts(bits):
    """`linear.meta`, in quant/hqq.py: with `W_q`, `bias`, `out_features`, `in_features`, `cuda` and `ready` all that
    an `HQQLinear` holds; one put together from stored parts is as one that HQQ quantized."""
    from hqq.core.quantize import HQQLinear

    from ds_llmpq.quant.config import QuantConfig
    from ds_llmpq.quant.hqq import quantize_linear, restore_linear, split_parts

    quant, cpu = QuantConfig([3, 4, 8, 16], 32, 1, False), torch.device("cpu")
    bias = torch.randn(80)
    made = quantize_linear(torch.randn(80, 64), bias, bits, quant, torch.float32, cpu)
    restored = restore_linear(split_parts(made), (80, 64), bias, bits, quant, torch.float32, cpu)
    assert isinstance(made, HQQLinear)
    # `compute_dtype` and the like appear once it has run
    assert {name: type(value) for name, value in restored.meta.items()} == {
        name: type(value) for name, value in made.meta.items()
    }
    inputs = torch.randn(3, 64)
    assert torch.equal(restored(inputs), made(inputs))
    assert (restored.out_features, restored.in_features, restored.ready) == (80, 64, True)


def test_layers_not_quantized_at_once():
    """`HQQLinear(initialize=False)`, in quant/hqq.py: an empty layer, whose parts are filled in afterwards; `cuda`
    places and casts them on any device."""
    from hqq.core.quantize import HQQLinear

    takes(HQQLinear.__init__, "linear_layer", "quant_config", "compute_dtype", "device", "initialize")
    assert parameters(HQQLinear.cuda) == ["device"]


def test_layers_from_a_weight():
    """`HQQLinear.from_weights(weight, bias, quant_config, compute_dtype, device)`, in quant/hqq.py: quantizes without a
    linear."""
    from hqq.core.quantize import HQQLinear

    assert parameters(HQQLinear.from_weights)[:5] == ["weight", "bias", "quant_config", "compute_dtype", "device"]


def test_whether_to_optimize():
    """`BaseQuantizeConfig()["weight_quant_params"]["optimize"]`, in quant/hqq.py: set after the configuration is made,
    read by `Quantizer.quantize`."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    assert config["weight_quant_params"]["optimize"] is True
    takes(Quantizer.quantize, *config["weight_quant_params"])


def test_imports_without_the_compiler():
    """`compile`, in quant/hqq_import.py: decorates three methods of `HQQLinear` while the module is imported, called
    without arguments. HQQ itself then loads no compiler (DeepSpeed 0.19.0 does; later ones do not)."""
    code = (
        "import sys; from ds_llmpq.quant.hqq_import import import_hqq; import_hqq(); import torch;"
        "from hqq.core.quantize import HQQLinear;"
        "assert 'torch._dynamo' not in sys.modules; assert torch.compile.__module__ == 'torch';"
        "assert callable(HQQLinear.forward_pytorch_compile)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
