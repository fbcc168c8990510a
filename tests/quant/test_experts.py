"""Experts below 16 bits: each linear of each expert is HQQ's, the router stays as it is, checkpoints keep them."""

import pytest
import torch
from hqq.core.quantize import HQQLinear

from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.pretrained import load_quantized
from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
from ds_llmpq.quant.writer import write_quantized
from scripts.make_checkpoint import make_checkpoint

CPU = torch.device("cpu")
BITS = [4, 8, 16]
QUANT = QuantConfig([4, 8, 16], 32, 1, False)
SMALL = {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 96, "max_positions": 64, "dtype": "float32"}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
}


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, request.param, tokenizer=None, config=FAMILIES[request.param], **SMALL)


def loader_of(checkpoint, bits=BITS):
    return LayerLoader(checkpoint, list(bits), QUANT, torch.float32, CPU)


@torch.inference_mode()
def behind(loader, layers, hidden):
    rows, tokens, _ = hidden.shape
    step = Step(torch.arange(tokens).expand(rows, -1), None, tokens, True, hidden=hidden)
    step.prepare = loader.decoder.positions()
    for layer in layers:
        step = layer(step)
    return step.hidden


def test_quantized_experts_compute_with_their_own_weights(path):
    """As the unquantized layer does with the weights that HQQ has made of them."""
    loader, plain = loader_of(Checkpoint(path)), loader_of(Checkpoint(path), [16] * 3)
    hidden = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    for index, bits in enumerate(BITS):
        layer, expected = loader.decoder_layer(index), plain.decoder_layer(index)
        for role in loader.decoder.spec.linears(index):
            linear = layer.get_submodule(role.name)
            assert isinstance(linear, HQQLinear) == (bits < 16)
            if bits < 16:
                expected.get_submodule(role.name).weight.data = linear.dequantize()
        assert torch.equal(layer.mlp.gate.weight, expected.mlp.gate.weight)
        found, wanted = (behind(loader, [each], hidden.clone()) for each in (layer, expected))
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert (wanted - behind(loader, [plain.decoder_layer(index)], hidden.clone())).abs().max() > 0 or bits == 16


def test_a_quantized_checkpoint_holds_experts(path, tmp_path):
    out = tmp_path / "q"
    write_quantized(path, out, BITS, QUANT)
    there, anew = loader_of(open_checkpoint(out)), loader_of(Checkpoint(path))
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    layers = [[each.decoder_layer(index) for index in range(3)] for each in (there, anew)]
    assert torch.equal(behind(there, layers[0], hidden.clone()), behind(anew, layers[1], hidden.clone()))
    assert len(there.checkpoint.recipe.bits) == read_shape(out).layers
    with pytest.raises(UserError, match="mixture of experts"):
        load_quantized(out)
