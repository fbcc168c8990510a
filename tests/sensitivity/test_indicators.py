"""Indicators against slow references: the theorem written out, autograd's full Hessian, models quantized one by one."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hqq.core.quantize import Quantizer
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import list_linears, quantize_linear
from ds_llmpq.sensitivity import indicators
from ds_llmpq.sensitivity.curvature import Curvature
from ds_llmpq.sensitivity.layerwise import Layerwise, measure
from ds_llmpq.sensitivity.resume import Progress
from scripts.make_checkpoint import make_checkpoint

LAYERS = 3
SMALL = {"layers": LAYERS, "hidden": 32, "heads": 2, "vocab": 64, "max_positions": 64, "dtype": "float32"}
CPU = torch.device("cpu")
WIDTHS = [2, 4, 8]


def quant(axis=1, size=16):
    return QuantConfig(WIDTHS, size, axis, True)


@pytest.fixture(scope="module", params=["llama", "opt", "bloom"])
def path(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, tokenizer=None, seed=5, **SMALL)


def layerwise(path, settings=None, rows=3, length=11):
    tokens = torch.randint(0, 64, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return Layerwise(Checkpoint(path), settings or quant(), tokens, CPU, rows_at_once=2)


def transformers_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def decoder_layers(model):
    inner = model.model if hasattr(model, "model") else model.transformer
    return getattr(inner, "layers", None) or getattr(getattr(inner, "decoder", inner), "layers", None) or inner.h


def nowhere(tmp_path):
    return Progress(tmp_path, {})


def quantized_copy(model, bits, settings):
    model = copy.deepcopy(model)
    for layer, width in zip(decoder_layers(model), bits, strict=True):
        for name in list_linears(layer) if width < 16 else ():
            linear = layer.get_submodule(name)
            packed = quantize_linear(linear.weight.data, None, width, settings, torch.float32, CPU)
            linear.weight.data = packed.dequantize()
    return model


@torch.no_grad()
def test_measured_equals_transformers_with_the_same_weights(path):
    model, plain = layerwise(path), transformers_model(path)
    variants = [(16, 16, 16), (2, 16, 4), (2, 16, 16), (16, 16, 3), (4, 4, 4)]
    found = measure(model, variants)
    few = measure(model, variants, state_bytes=1)
    reference = plain(model.inputs).logits.log_softmax(-1)
    for variant in variants:
        logits = quantized_copy(plain, variant, quant())(model.inputs).logits.log_softmax(-1)
        target = model.targets[..., None]
        increase = (reference.gather(-1, target) - logits.gather(-1, target)).mean().item()
        kl = F.kl_div(logits, reference, log_target=True, reduction="none").sum(-1).mean().item()
        assert found[variant].loss == pytest.approx(increase, abs=2e-5)
        assert found[variant].kl == pytest.approx(kl, abs=2e-5)
        assert few[variant] == found[variant]


@pytest.mark.parametrize(("axis", "per_channel_bits"), [(0, []), (1, []), (1, [8])])
def test_variance_is_the_theorem_written_out(path, axis, per_channel_bits, tmp_path):
    settings = replace(quant(axis), per_channel_bits=per_channel_bits)
    model, plain = layerwise(path, settings), transformers_model(path)
    table = indicators.estimate_variance(model, WIDTHS, settings, nowhere(tmp_path), lambda *_: None)
    for index, layer in enumerate(decoder_layers(plain)):
        entered = {}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name, into=entered: into.__setitem__(name, inputs[0].flatten(0, -2))
            )
            for name in list_linears(layer)
        ]
        with torch.no_grad():
            plain(model.inputs)
        for hook in hooks:
            hook.remove()
        for column, bits in enumerate(WIDTHS):
            expected = 0.0
            for name, x in entered.items():
                weight = layer.get_submodule(name).weight.data
                # the step of every weight, as HQQ itself says it
                size = weight.shape[1] if bits in per_channel_bits else 16
                _, meta = Quantizer.quantize(weight, bits, group_size=size, axis=axis, optimize=False, device="cpu")
                steps = meta["scale"].expand(*((-1, size) if axis else (size, -1))).reshape(weight.shape)
                expected += (steps**2 @ x.var(0, unbiased=False) / 4).mean().item()
            assert table[index][column] == pytest.approx(expected, rel=1e-4)


def full_hessian(model, layers, head, hidden):
    """Of the mean loss with respect to the first layer's linears, entry by entry."""
    first = layers[0]
    names = list_linears(first)
    weights = torch.cat([first.get_submodule(name).weight.detach().flatten() for name in names])

    def loss(flat):
        parts = flat.split([first.get_submodule(name).weight.numel() for name in names])
        state = {
            f"{name}.weight": part.reshape(first.get_submodule(name).weight.shape)
            for name, part in zip(names, parts, strict=True)
        }
        out = functional_call(layers[0], state, (model._step(hidden=hidden),)).hidden
        for layer in layers[1:]:
            out = model.apply(layer, out)
        return F.cross_entropy(model.compute_logits(head, out).flatten(0, 1), model.targets[: len(hidden)].flatten())

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, weights, vectorize=False), names


@pytest.mark.slow
def test_curvature_is_that_of_the_full_hessian(tmp_path):
    small = SMALL | {"layers": 2, "hidden": 8, "heads": 1, "intermediate": 8, "vocab": 16}
    path = make_checkpoint(tmp_path / "m", "llama", tokenizer=None, seed=2, **small)
    tokens = torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    model = Layerwise(Checkpoint(path), QuantConfig(WIDTHS, 8, 1, True), tokens, CPU)
    layers, head, hidden = [model.layer(0), model.layer(1)], model.head(), model.embed().clone()
    matrix, names = full_hessian(model, layers, head, hidden)
    largest = torch.linalg.eigvalsh(matrix)[-1].item()
    found = Curvature(model, layers, head, hidden, seed=0).eigenvalue()
    assert found[names[0]] == pytest.approx(largest, rel=0.1)
    traces = [Curvature(model, layers, head, hidden, seed=seed).traces() for seed in range(24)]
    start = 0
    for name in names:
        size = layers[0].get_submodule(name).weight.numel()
        values = torch.tensor([trace[name] for trace in traces])
        exact = matrix.diagonal()[start : start + size].mean().item()
        assert abs(values.mean() - exact) < 5 * values.std() / len(values) ** 0.5 + 1e-6, name
        start += size


def test_the_top_eigenvalue_is_not_the_one_of_largest_magnitude(monkeypatch):
    """A Hessian with eigenvalues -5, 3, 1, 0.5 by its products alone."""
    diagonal = torch.tensor([-5.0, 3.0, 1.0, 0.5])
    curvature = Curvature.__new__(Curvature)
    curvature.weights = {"a": torch.nn.Parameter(torch.zeros(4))}
    curvature.generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(Curvature, "_products", lambda self, vectors: [diagonal * vectors[0]])
    assert curvature.eigenvalue()["a"] == pytest.approx(3.0, rel=0.1)


def test_a_run_goes_on_where_it_stopped(path, tmp_path, monkeypatch):
    monkeypatch.setattr("ds_llmpq.sensitivity.resume._SECONDS_BETWEEN_STATES", 0.0)
    model = layerwise(path)
    whole = indicators.estimate_variance(model, WIDTHS, quant(), nowhere(tmp_path), lambda *_: None)
    (tmp_path / "progress.json").unlink()
    identity = {"model": "x", "bits": (2, 4)}

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        indicators.estimate_variance(model, WIDTHS, quant(), Progress(tmp_path, identity), stop)
    rest = []
    again = indicators.estimate_variance(
        model, WIDTHS, quant(), Progress(tmp_path, identity), lambda *done: rest.append(done)
    )
    assert rest == [(3, 3)]
    assert again == whole
    indicators.estimate_variance(
        model, WIDTHS, quant(), Progress(tmp_path, {"model": "y"}), lambda *done: rest.append(done)
    )
    assert len(rest) == 4  # another model: all layers anew

    with pytest.raises(Stop):
        indicators.measure_each_layer(model, WIDTHS, Progress(tmp_path, identity), stop, 1 << 30)
    rest.clear()
    found = indicators.measure_each_layer(
        model, WIDTHS, Progress(tmp_path, identity), lambda *d: rest.append(d), 1 << 30
    )
    assert rest == [(3, 3)]
    assert found == indicators.measure_each_layer(model, WIDTHS, Progress(tmp_path, {}), lambda *_: None, 1 << 30)


def test_random_is_seeded_and_falls_with_the_width():
    table = indicators.draw_table(5, WIDTHS, 3)
    assert table == indicators.draw_table(5, WIDTHS, 3)
    assert table != indicators.draw_table(5, WIDTHS, 4)
    assert all(row == sorted(row, reverse=True) for row in table)
