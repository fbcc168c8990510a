"""Decode passes with compiled blocks: the logits of plain ones, whatever the rows, compiled once for each kind."""

import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch
from pipeline_cases import Draw
from test_captured_decode import VOCABULARY, Stage, decode_step, eager, filled, models  # noqa: F401
from test_identity import run_and_check
from torch import nn

from ds_llmpq.engine.runner import fusion as fusion_module
from ds_llmpq.engine.runner.fusion import Fusion
from ds_llmpq.models.block import Block
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import quantize_linear
from ds_llmpq.quant.kernel_linear import build_linears
from ds_llmpq.quant.kernels.humming import HUMMING
from ds_llmpq.quant.kernels.linears import group_linears
from ds_llmpq.quant.packing import Groups

sys.path.insert(0, str(Path(__file__).parents[1] / "quant"))
import fake_humming

CPU = torch.device("cpu")
ERROR = 1e-5  # of the logits' norm, in float32: sums in another order


def fuse(ours, told):
    torch.compiler.reset()
    fusion = Fusion(Stage(*ours.layers), ours.decoder.positions(), torch.float32, CPU, told.append)
    fusion.compile()
    return fusion


def check_decode(ours, fusion, seed):
    """Six passes of one to five rows at unequal positions, through compiled blocks and plain ones."""
    module, positional, numbers = (
        Stage(ours.embedding, *ours.layers, ours.head),
        ours.decoder.positions(),
        random.Random(seed),
    )
    lengths = [3, 9, 1, 12, 6]
    ours_store, plain = (filled(ours, lengths, seed) for _ in range(2))
    for number in range(6):
        rows = (5, 1, 2, 4, 3, 5)[number]
        tokens = [numbers.randrange(3, VOCABULARY) for _ in range(rows)]
        at = [length + number for length in lengths[:rows]]
        with fusion.use(), torch.inference_mode():
            found = eager(module, positional, decode_step(ours_store, 0, tokens, at, max(at) + 1))[1]
        expected = eager(module, positional, decode_step(plain, 0, tokens, at, max(at) + 1))[1]
        assert (found - expected).norm() <= ERROR * expected.norm()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt-projected-post-norm", "bloom", "gemma2", "phi3-long"])
def test_compiled_blocks_give_what_plain_ones_give(models, name):  # noqa: F811
    ours, told = models(name), []
    fusion = fuse(ours, told)
    assert len(fusion.blocks) == len(ours.layers), told
    with torch.compiler.set_stance("fail_on_recompile"):
        check_decode(ours, fusion, 3)
    assert all(layer.halves == (Block.enter, Block.leave) for layer in ours.layers)


@pytest.mark.slow
def test_a_kernel_s_products_are_called_from_compiled_blocks(models, monkeypatch):  # noqa: F811
    """Two widths, linears of one input as one product; the layers of a width share what was compiled."""
    fake_humming.install(monkeypatch)
    monkeypatch.setattr(type(HUMMING), "takes", lambda *arguments: True)
    ours, told = models("mistral-window"), []  # which no other test uses
    for index, layer in enumerate(ours.layers):
        bits = 4 if index % 2 else 8
        for group in group_linears(HUMMING, ours.decoder.spec.linears(index), bits, Groups(32)):
            linears = [
                quantize_linear(layer.get_submodule(role.name).weight.data, None, bits,
                                QuantConfig([bits], 32, optimize=False), torch.float32, CPU)
                for role in group
            ]  # fmt: skip
            for role, module in zip(
                group, build_linears(HUMMING, linears, bits, Groups(32), torch.float32), strict=True
            ):
                layer.set_submodule(role.name, module)
    fusion = fuse(ours, told)
    assert len(fusion.blocks) == len(ours.layers), told
    with torch.compiler.set_stance("fail_on_recompile"):
        check_decode(ours, fusion, 4)


def test_what_cannot_be_compiled_stays_as_it_is(models, monkeypatch):  # noqa: F811
    ours, told = models("mixtral"), []
    assert not fuse(ours, told).blocks
    assert not told
    ours = models("llama")

    def refuse(*arguments):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(fusion_module.torch, "compile", lambda **options: lambda function: refuse)
    fusion = fuse(ours, told)
    assert not fusion.blocks
    assert told == ["decoder blocks run uncompiled, which is slower (RuntimeError: no compiler here)"]
    check_decode(ours, fusion, 5)
    quantized = nn.Module()
    quantized.blocks = nn.ModuleList(ours.layers[:1])
    linear = ours.layers[0].mlp.up_proj
    hqq = quantize_linear(linear.weight.data, None, 4, QuantConfig([4], 32, optimize=False), torch.float32, CPU)
    ours.layers[0].mlp.up_proj = hqq
    assert not Fusion(quantized, ours.decoder.positions(), torch.float32, CPU, told.append).blocks
    ours.layers[0].mlp.up_proj = linear


@pytest.mark.slow
def test_tokens_are_those_of_plain_blocks(ranks, checkpoint_of):
    draw = Draw(seed=60)
    case, expected = draw.case(checkpoint_of("llama"), 2, (16,) * 5)
    run_and_check(ranks, [(dataclasses.replace(case, options={"compile_blocks": True}), expected)])
