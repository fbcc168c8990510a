"""Checkpoints whose files and config.json disagree on whether lm_head is the embedding."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.families import find_family
from ds_llmpq.models.shape import read_shape
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.pretrained import load_quantized
from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
from ds_llmpq.quant.writer import write_quantized
from scripts.make_checkpoint import make_checkpoint

SMALL = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 128, "max_positions": 64, "dtype": "float32"}
FAMILIES = ("llama", "qwen2", "opt", "bloom")
HEAD = "lm_head.weight"


def tied(folder, arch: str, change) -> dict[str, torch.Tensor]:
    """A tied checkpoint whose tensors `change(tensors, embedding's name)` has changed."""
    make_checkpoint(folder, arch, tied=True, tokenizer=None, **SMALL)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, find_family(arch).embedding_tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def own_head(tensors, embedding):
    tensors[HEAD] = torch.randn(tensors[embedding].shape, generator=torch.Generator().manual_seed(1)) / 8


def same_head(tensors, embedding):
    tensors[HEAD] = tensors[embedding].clone()


def head_alone(tensors, embedding):
    tensors[HEAD] = tensors.pop(embedding)


def weights(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and lm_head as the pipeline loads them."""
    checkpoint = open_checkpoint(folder)
    loader = LayerLoader(checkpoint, [16, 16], QuantConfig(bits=[16]), torch.float32, torch.device("cpu"))
    embedding, head = loader.embedding(), loader.head()
    return next(embedding.parameters()), head.lm_head.weight


@pytest.mark.parametrize("change", [own_head, same_head, head_alone])
@pytest.mark.parametrize("arch", FAMILIES)
def test_matrices_and_sizes_are_those_of_transformers(tmp_path, arch, change):
    tied(tmp_path, arch, change)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    embedding, head = weights(tmp_path)
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    assert torch.equal(head, model.get_output_embeddings().weight)
    shape = read_shape(tmp_path)
    assert shape.tied_embeddings == (change is not own_head)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("change", [own_head, head_alone])
@pytest.mark.parametrize("lm_head_bits", [16, 8])
def test_a_quantized_folder_keeps_the_head(tmp_path, change, lm_head_bits):
    tensors = tied(tmp_path / "source", "llama", change)
    quant = QuantConfig(bits=[16], group_size=32, lm_head_bits=lm_head_bits)
    write_quantized(tmp_path / "source", tmp_path / "out", [16, 16], quant)
    assert read_shape(tmp_path / "source").fingerprint == read_shape(tmp_path / "out").fingerprint
    model = load_quantized(tmp_path / "out", torch.float32)
    tokens = torch.tensor([[5, 9, 3]])
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)(tokens).logits
    tolerance = 1e-5 if lm_head_bits == 16 else 0.1
    assert (model(tokens).logits - wanted).abs().max() < tolerance * wanted.abs().max()
    assert HEAD in tensors


def test_a_head_in_another_shard_is_found(tmp_path):
    tensors = tied(tmp_path, "llama", own_head)
    head = {HEAD: tensors.pop(HEAD)}
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file(head, tmp_path / "b.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(tensors, "a.safetensors") | {HEAD: "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert not read_shape(tmp_path).tied_embeddings
    assert not Checkpoint(tmp_path).config.tie_word_embeddings
    assert torch.equal(weights(tmp_path)[1], head[HEAD])
