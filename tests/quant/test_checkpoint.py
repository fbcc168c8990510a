"""Quantized checkpoints: bit-exact, resumable, layers reused, damage named; the pipeline's reader and transformers'."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hqq.core.quantize import HQQLinear
from transformers import AutoModelForCausalLM

from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.quant import writer
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.pretrained import load_quantized
from ds_llmpq.quant.quantized_checkpoint import MANIFEST, open_checkpoint
from ds_llmpq.quant.recipe import read_recipe
from ds_llmpq.quant.writer import write_quantized
from scripts.make_checkpoint import make_checkpoint

BITS = [2, 16, 3, 4, 8, 1]
QUANT = QuantConfig([1, 2, 3, 4, 8], 32, 1, True, zeros="whole")
ROWS = replace(QUANT, per_channel_bits=[8])
SMALL = {"layers": 6, "hidden": 64, "heads": 4, "vocab": 128, "max_positions": 64}
VARIANTS = {
    "llama": {"arch": "llama", "kv_heads": 2},
    "llama-biased-tied": {"arch": "llama", "tied": True, "config": {"attention_bias": True}, "shard_size": "100KB"},
    "qwen3": {"arch": "qwen3", "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"},
    "opt": {"arch": "opt", "word_embed_proj_dim": 32, "layer_norm_before": False},
    "bloom": {"arch": "bloom"},
    "phi3": {"arch": "phi3", "kv_heads": 2, "config": {"pad_token_id": 0}},
    "gemma2": {"arch": "gemma2", "kv_heads": 2, "head_dim": 32, "tied": True},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), tokenizer=None, seed=3, **SMALL, **VARIANTS["llama"])


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    write_quantized(source, folder, BITS, QUANT)
    return folder


def loader(checkpoint, dtype, bits=BITS, quant=QUANT):
    return LayerLoader(checkpoint, bits, quant, dtype, torch.device("cpu"))


def tensors_of(module):
    """Every tensor that decides what a module computes, by name."""
    found = {name: parameter.data for name, parameter in module.named_parameters()}
    for name, child in module.named_modules():
        if isinstance(child, HQQLinear):
            found |= {f"{name}.{part}": child.meta[part] for part in ("scale", "zero")}
            found |= {f"{name}.bias": child.bias} if child.bias is not None else {}
            found[f"{name}.meta"] = str({k: v for k, v in child.meta.items() if k not in ("scale", "zero")})
    return found


def assert_equal(left, right):
    left, right = tensors_of(left), tensors_of(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        same = value == other if isinstance(value, str) else value.dtype == other.dtype and torch.equal(value, other)
        assert same, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", [QUANT, ROWS], ids=["groups", "rows"])
def test_stored_layers_equal_those_quantized_while_loading(tmp_path, variant, dtype, quant):
    path = make_checkpoint(tmp_path / "model", tokenizer=None, seed=1, **SMALL, **VARIANTS[variant])
    write_quantized(path, tmp_path / "quantized", BITS, quant)
    direct = loader(Checkpoint(path), dtype, quant=quant)
    stored = loader(open_checkpoint(tmp_path / "quantized"), dtype, quant=quant)
    for index in range(len(BITS)):
        assert_equal(direct.decoder_layer(index), stored.decoder_layer(index))
    assert_equal(direct.embedding(), stored.embedding())
    assert_equal(direct.head(), stored.head())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quant", [QUANT, ROWS], ids=["groups", "rows"])
def test_load_quantized_computes_what_dequantized_weights_compute(tmp_path, variant, quant):
    path = make_checkpoint(tmp_path / "model", tokenizer=None, seed=2, **SMALL, **VARIANTS[variant])
    write_quantized(path, tmp_path / "quantized", BITS, quant)
    model = load_quantized(tmp_path / "quantized", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            plain.get_submodule(name).weight.data = module.dequantize()
            count += 1
    assert count >= 5 * 4  # five of six layers are quantized
    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=5e-4)
    assert model.generate(tokens[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 20)


def test_what_the_folder_holds(source, written):
    config = json.loads((written / "config.json").read_text())
    assert config["quantization_config"]["bits"] == BITS
    assert read_recipe(written).bits == tuple(BITS)
    assert fingerprint(written) == fingerprint(source)
    index = json.loads((written / "quantized.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in written.glob("*.safetensors")}
    assert index["weight_map"]["model.layers.0.mlp.up_proj.W_q"] == "model-00002-of-00008.safetensors"
    assert read_recipe(source) is None


def test_transformers_refuses_the_folder(written):
    """Rather than a model of random weights, and a warning."""
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(written)


def test_a_folder_with_the_former_index_is_read_and_written_anew(source, written, tmp_path):
    folder = tmp_path / "former"
    shutil.copytree(written, folder)
    (folder / "quantized.safetensors.index.json").rename(folder / "model.safetensors.index.json")
    name = "model.layers.0.mlp.up_proj.W_q"
    (_, here), (_, there) = (next(open_checkpoint(path).tensors([name])) for path in (folder, written))
    assert torch.equal(here, there)
    assert write_quantized(source, folder, BITS, QUANT).reused == 8
    assert {file.name for file in folder.iterdir()} == {file.name for file in written.iterdir()}


def test_tokenizer_and_template_are_copied(tmp_path):
    path = make_checkpoint(tmp_path / "model", seed=1, **SMALL | {"vocab": 2048})
    write_quantized(path, tmp_path / "quantized", [4] * 6, QUANT)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "quantized" / name).read_bytes() == (path / name).read_bytes()


def test_a_changed_plan_rewrites_only_what_changed(source, written, tmp_path):
    folder, before = tmp_path / "q", {file.name: file.read_bytes() for file in written.iterdir()}
    again = write_quantized(source, folder, [2, 16, 4, 4, 8, 1], QUANT, reuse=written)
    assert (again.parts, again.reused) == (8, 7)
    fresh = tmp_path / "fresh"
    write_quantized(source, fresh, [2, 16, 4, 4, 8, 1], QUANT)
    for file in fresh.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    back = write_quantized(source, folder, BITS, QUANT)
    assert back.reused == 7
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    other_group = write_quantized(source, folder, BITS, QuantConfig([2], 64, 1, True))
    assert other_group.reused == 3  # embedding, head, and the layer at 16 bits


def test_per_channel_rewrite_only_the_layers_at_those_widths(source, written, tmp_path):
    again = write_quantized(source, tmp_path, BITS, ROWS, reuse=written)
    assert (again.parts, again.reused) == (8, 7)
    assert read_recipe(tmp_path).quant.per_channel_bits == [8]
    layer = loader(open_checkpoint(tmp_path), torch.float32, quant=ROWS).decoder_layer(4)
    assert layer.mlp.up_proj.meta["scale"].numel() == layer.mlp.up_proj.out_features


def test_a_killed_run_goes_on(source, written, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 4:
            raise Killed

    folder = tmp_path / "q"
    with pytest.raises(Killed):
        write_quantized(source, folder, BITS, QUANT, on_written=kill)
    with pytest.raises(UserError, match=r"no config\.json"):
        open_checkpoint(folder)
    assert write_quantized(source, folder, BITS, QUANT).reused == 4
    for file in written.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_damage_is_named_and_repaired(source, written, tmp_path):
    folder = tmp_path / "q"
    shutil.copytree(written, folder)
    shard = folder / "model-00004-of-00008.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    reader = loader(open_checkpoint(folder), torch.float32)
    reader.decoder_layer(1)
    with pytest.raises(UserError, match=r"model-00004-of-00008.safetensors has checksum .* repairs this shard"):
        reader.decoder_layer(2)
    assert write_quantized(source, folder, BITS, QUANT).reused == 7
    loader(open_checkpoint(folder), torch.float32).decoder_layer(2)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_checkpoint(folder)
    (folder / MANIFEST).unlink()
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"quantized\.json cannot be read"):
        open_checkpoint(folder)


def test_other_widths_or_settings_than_asked(written):
    checkpoint = open_checkpoint(written)
    with pytest.raises(UserError, match=r"Layer 0 is kept at 2 bits .* but 4 are asked for"):
        loader(checkpoint, torch.float32, bits=[4] * 6)
    with pytest.raises(UserError, match=r"Layer 1 is kept at 16 bits"):
        loader(checkpoint, torch.float32, bits=[2, *[4] * 5])
    with pytest.raises(UserError, match=r"holds 6 layers, but 1 are asked for"):
        loader(checkpoint, torch.float32, bits=[2])
    with pytest.raises(UserError, match=r"lm_head is kept at 16 bits .* but 8 are"):
        loader(checkpoint, torch.float32, quant=replace(QUANT, lm_head_bits=8))
    for zeros in ("real", "auto"):  # an unresolved auto runs by HQQ's own forward
        with pytest.raises(UserError, match=r"quantized with zeros whole, but real is asked for; run `ds-llmpq"):
            loader(checkpoint, torch.float32, quant=replace(QUANT, zeros=zeros))
    with pytest.raises(UserError, match="quantized with optimize True, but False is asked for"):
        loader(checkpoint, torch.float32, quant=replace(QUANT, optimize=False))
    with pytest.raises(UserError, match="group_size 32, but 64"):
        loader(checkpoint, torch.float32, quant=replace(QUANT, group_size=64))
    with pytest.raises(
        UserError, match=r"quantized with per_channel_bits \[\], but \[8\] is asked for; run `ds-llmpq quantize"
    ):
        loader(checkpoint, torch.float32, quant=ROWS)


def test_a_recipe_from_before_per_channel_and_one_that_cannot_be(written, tmp_path):
    config = json.loads((written / "config.json").read_text())
    noted = config["quantization_config"]
    assert noted.pop("per_channel_bits") == []
    for other in ({}, {"per_channel_bits": []}, {"per_channel_bits": [8]}):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": noted | other}))
        assert read_recipe(tmp_path).quant.per_channel_bits == other.get("per_channel_bits", [])
    noted["head_bits"] = noted.pop("lm_head_bits")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": noted | {"whole_rows": [8]}}))
    assert read_recipe(tmp_path).quant == replace(read_recipe(written).quant, per_channel_bits=[8])
    for other in ({"per_channel_bits": [16]}, {"per_channel_bits": "8"}, {"per_channel_bits": [8], "axis": 0}):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": noted | other}))
        with pytest.raises(UserError, match=r"quantization_config.*per_channel_bits.*quantize the model again"):
            read_recipe(tmp_path)


def test_mistakes(source, written, tmp_path):
    with pytest.raises(UserError, match="2 widths are given for the 6 layers"):
        write_quantized(source, tmp_path / "q", [4, 4], QUANT)
    with pytest.raises(UserError, match="is quantized already"):
        write_quantized(written, tmp_path / "q", BITS, QUANT)
    with pytest.raises(UserError, match="model's own folder"):
        write_quantized(source, source, BITS, QUANT)
    with pytest.raises(UserError, match="cannot be kept at 5 bits"):
        write_quantized(source, tmp_path / "q5", [5] * 6, QUANT)
    shutil.copytree(source, tmp_path / "other")
    with pytest.raises(UserError, match="holds other safetensors"):
        write_quantized(source, tmp_path / "other", BITS, QUANT)
    with pytest.raises(UserError, match="was not written by"):
        load_quantized(source)


def test_memory_holds_one_layer(source, tmp_path, monkeypatch):
    """No more than one layer's tensors are ever asked of the source at once."""
    asked = []
    original = Checkpoint.tensors
    monkeypatch.setattr(Checkpoint, "tensors", lambda self, names: asked.append(names) or original(self, names))
    writer.write_quantized(source, tmp_path / "q", BITS, QUANT)
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in asked]
    assert all(len(found) <= 1 for found in layers)


@pytest.mark.parametrize("claimed", ["0" * 64, 7, None, "x" * 64, ["a"], "\x1b[2J"])
def test_a_source_that_it_was_not_made_from_is_not_believed(written, tmp_path, claimed):
    for file in written.glob("*.json"):
        shutil.copy(file, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["source_fingerprint"] = claimed
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="quantize the model again"):
        fingerprint(tmp_path)
