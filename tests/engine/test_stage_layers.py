"""Pipeline layers as loaded: bytes as the cost model counts them, weights as the checkpoint has them, wrong shapes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from pipeline_cases import GROUP_SIZE, LAYERS, VARIANTS, reference
from safetensors.torch import load_file, save_file

from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes, list_linears
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import make_groups

WIDTHS = [16, 8, 4, 3, 2]
QUANT = QuantConfig(bits=WIDTHS, group_size=GROUP_SIZE, axis=1, optimize=False)


def loader_of(path, dtype=torch.float32, bits=WIDTHS, quant=QUANT, on_loaded=lambda name: None):
    return LayerLoader(Checkpoint(path), bits, quant, dtype, torch.device("cpu"), on_loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_channel_bits", [[], [8], [2, 3, 4, 8]])
def test_bytes_are_the_memory_model_s(checkpoint_of, variant, dtype, per_channel_bits):
    """Of every layer at every width, and of a whole stage with a tied head, which then costs nothing."""
    path = checkpoint_of(variant)
    quant = replace(QUANT, per_channel_bits=per_channel_bits)
    memory = MemoryModel(read_shape(path), make_groups(quant), dtype.itemsize)
    loader = loader_of(path, dtype, quant=quant)
    layers = [loader.decoder_layer(index) for index in range(LAYERS)]
    assert [count_stored_bytes(layer) for layer in layers] == [memory.layer_bytes(width) for width in WIDTHS]
    head_alone = loader.head()
    assert count_stored_bytes(head_alone) == memory.head_bytes()
    embedding = loader.embedding()
    assert count_stored_bytes(embedding) == memory.embed_bytes()
    stage = torch.nn.ModuleList([embedding, *layers, loader.head()])
    shared = memory.shares_embedding * memory.shape.lm_head.weights * dtype.itemsize
    ends = memory.embed_bytes() + memory.head_bytes() - shared
    assert count_stored_bytes(stage) == sum(memory.layer_bytes(width) for width in WIDTHS) + ends


@pytest.mark.parametrize(("group_size", "axis"), [(8, 1), (64, 1), (16, 0)])
def test_bytes_for_other_groups(checkpoint_of, group_size, axis):
    path = checkpoint_of("qwen2")
    quant = QuantConfig(bits=WIDTHS, group_size=group_size, axis=axis, optimize=False)
    memory = MemoryModel(read_shape(path), make_groups(quant), 4)
    loader = loader_of(path, quant=quant)
    for index, width in enumerate(WIDTHS):
        assert count_stored_bytes(loader.decoder_layer(index)) == memory.layer_bytes(width)


@pytest.mark.parametrize("variant", ["llama-biased-tied", "opt-projected-post-norm", "bloom"])
def test_unquantized_parameters_are_the_checkpoint_s(checkpoint_of, variant):
    """Every parameter of transformers' model turns up once, with its values, frozen; all is announced as it is read."""
    path, loaded = checkpoint_of(variant), []
    loader = loader_of(path, bits=[16] * LAYERS, on_loaded=loaded.append)
    parts = [loader.embedding(), *(loader.decoder_layer(index) for index in range(LAYERS)), loader.head()]
    found = {}
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        assert not parameter.requires_grad
        found[parameter.data_ptr()] = parameter
    wanted = dict(reference(path).model.named_parameters())
    assert len(found) == len(wanted)
    values = [parameter for parameter in found.values()]
    for name, parameter in wanted.items():
        assert any(value.shape == parameter.shape and torch.equal(value, parameter) for value in values), name
    assert loaded == ["embedding", *(f"layer {index}" for index in range(LAYERS)), "head"]


def test_only_linears_of_decoder_layers_are_quantized(checkpoint_of):
    loader = loader_of(checkpoint_of("qwen3"), bits=[4] * LAYERS)
    layer = loader.decoder_layer(2)
    kept = {name for name, parameter in layer.named_parameters() if not name.endswith("W_q")}
    norms = {"attention_norm", "mlp_norm", "self_attn.q_norm", "self_attn.k_norm"}
    assert kept == {f"{name}.weight" for name in norms}
    assert list_linears(layer) == []
    assert list_linears(loader.head()) == ["lm_head"]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("key", ["intermediate_size", "vocab_size"])
def test_weights_that_the_configuration_does_not_describe(checkpoint_of, tmp_path, key, bits):
    path = tmp_path / "other"
    shutil.copytree(checkpoint_of("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: 192}))
    loader = loader_of(path, bits=[bits] * LAYERS)
    part = loader.embedding if key == "vocab_size" else lambda: loader.decoder_layer(0)
    with pytest.raises(UserError, match=r"has shape \(.*128.*\) instead of \(.*192.*\): the weights are not those"):
        part()


def test_a_missing_tensor_and_a_group_that_does_not_fit(checkpoint_of, tmp_path):
    path = tmp_path / "partial"
    shutil.copytree(checkpoint_of("opt"), path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.bias"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for bits in (16, 8):
        loader = loader_of(path, bits=[bits] * LAYERS)
        loader.decoder_layer(0)
        with pytest.raises(UserError, match=r"no tensor 'model.decoder.layers.1.fc1.bias'"):
            loader.decoder_layer(1)
    quant = QuantConfig(bits=[4], group_size=48, axis=1, optimize=False)
    with pytest.raises(UserError, match=r"64 x 64 linear cannot be kept at 4 bits: .*48"):
        loader_of(path, bits=[4] * LAYERS, quant=quant).decoder_layer(0)
