"""Random checkpoints: every family loads cleanly, values depend on name and seed alone, wrong shapes are refused."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ds_llmpq.errors import UserError
from scripts import make_checkpoint as module
from scripts.make_checkpoint import make_checkpoint, random_tensor

TINY = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 512}
CASES = {
    "llama": {"arch": "llama", "kv_heads": 2},
    "llama-tied": {"arch": "llama", "tied": True},
    "mistral": {"arch": "mistral", "kv_heads": 1, "intermediate": 96},
    "qwen2": {"arch": "qwen2", "kv_heads": 2},
    "qwen2-tied": {"arch": "qwen2", "tied": True},
    "qwen3": {"arch": "qwen3", "kv_heads": 2, "head_dim": 32},
    "opt": {"arch": "opt"},
    "opt-projected-post-norm": {"arch": "opt", "word_embed_proj_dim": 32, "layer_norm_before": False},
    "opt-untied": {"arch": "opt", "tied": False},
    "bloom": {"arch": "bloom"},
}


def load(path: Path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_family_loads_and_generates(tmp_path, case):
    model, info = load(make_checkpoint(tmp_path, **TINY | CASES[case], tokenizer=None))
    problems = {key: value for key, value in info.items() if value}
    assert not problems
    prompt = torch.arange(3, 27)[None] * 7 % 512
    tokens = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, 24:].tolist()
    assert len(set(tokens)) >= 5, f"degenerate output {tokens}"
    logits = model(prompt).logits
    assert 1.0 < logits.std() < 4.0
    top = logits.topk(2).values
    assert (top[..., 0] - top[..., 1]).min() > 0


@pytest.mark.parametrize("case", CASES)
def test_norms_and_biases_are_noisy(tmp_path, case):
    """A model that ignores a norm's weight or a bias must not pass for right."""
    for name, tensor in all_tensors(make_checkpoint(tmp_path, **TINY | CASES[case], tokenizer=None)).items():
        assert tensor.float().std() > 1e-3, name
        assert tensor.isfinite().all(), name


def test_family_specific_tensors(tmp_path):
    names = {case: set(all_tensors(make_checkpoint(tmp_path / case, **TINY | CASES[case]))) for case in CASES}
    assert "model.layers.1.self_attn.k_proj.bias" in names["qwen2"]
    assert "model.layers.1.self_attn.q_norm.weight" in names["qwen3"]
    assert "model.decoder.project_in.weight" in names["opt-projected-post-norm"]
    assert "model.decoder.final_layer_norm.weight" in names["opt"] - names["opt-projected-post-norm"]
    assert "transformer.word_embeddings_layernorm.bias" in names["bloom"]
    tied = {case for case in CASES if "lm_head.weight" not in names[case]}
    assert tied == {"llama-tied", "qwen2-tied", "opt", "opt-projected-post-norm", "bloom"}


def test_shards_add_up_to_the_unsharded_checkpoint(tmp_path):
    shard_bytes = 50_000
    whole = make_checkpoint(tmp_path / "whole", **TINY)
    sharded = make_checkpoint(tmp_path / "sharded", **TINY, shard_size="50KB")
    assert [file.name for file in whole.glob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    sizes = {}
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, "pt") as shard:
            sizes.setdefault(file, []).append(shard.get_tensor(name).nbytes)
    assert len(sizes) > 3
    assert set(sizes) == {file.name for file in sharded.glob("*.safetensors")}
    assert all(sum(tensors) <= shard_bytes or len(tensors) == 1 for tensors in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    expected, got = all_tensors(whole), all_tensors(sharded)
    assert expected.keys() == got.keys() == index["weight_map"].keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    problems = {key: value for key, value in load(sharded)[1].items() if value}
    assert not problems


def test_same_seed_same_bytes(tmp_path):
    first, again, other = (
        make_checkpoint(tmp_path / name, **TINY, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert {file.name for file in first.iterdir()} == {file.name for file in again.iterdir()}
    assert all(file.read_bytes() == (again / file.name).read_bytes() for file in first.iterdir())
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_tensor_depends_on_its_name_alone(tmp_path):
    tensors = all_tensors(make_checkpoint(tmp_path, **TINY, seed=3))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(random_tensor(name, tuple(tensors[name].shape), 2, torch.bfloat16, seed=3), tensors[name])
    other = random_tensor("model.layers.0.mlp.up_proj.weight", tuple(tensors[name].shape), 2, torch.bfloat16, seed=3)
    assert not torch.equal(other, tensors[name])


def test_tensors_larger_than_a_chunk_are_filled(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    tensor = random_tensor("lm_head.weight", (333, 64), 2, torch.float32, seed=0)
    assert tensor.std() == pytest.approx(2 / math.sqrt(64), rel=0.05)
    assert len(tensor.unique(dim=0)) == 333


def test_dtype_and_further_config_fields(tmp_path):
    make_checkpoint(tmp_path, "llama", **TINY, dtype="float32", config={"rope_theta": 5e5, "rms_norm_eps": 1e-4})
    config = json.loads((tmp_path / "config.json").read_text())
    assert {tensor.dtype for tensor in all_tensors(tmp_path).values()} == {torch.float32}
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-4


def test_tokenizer_is_copied_when_the_vocabulary_holds_it(tmp_path):
    large = make_checkpoint(tmp_path / "large", **TINY | {"vocab": 4096})
    small = make_checkpoint(tmp_path / "small", **TINY | {"vocab": 64})
    tokenizer = AutoTokenizer.from_pretrained(large)
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x", add_special_tokens=False)).startswith("def f")
    assert tokenizer.chat_template
    config = json.loads((large / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert not (small / "tokenizer.json").exists()
    with pytest.raises(UserError, match="vocab=100 is below the tokenizer's"):
        make_checkpoint(tmp_path / "explicit", **TINY | {"vocab": 100}, tokenizer=large)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gpt2"}, "Architecture 'gpt2' is unknown"),
        ({"dtype": "int8"}, "Data type 'int8' is unknown"),
        ({"hidden": 66}, "hidden=66 is not a multiple of heads=4"),
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"arch": "opt", "kv_heads": 2}, "no grouped-query attention"),
        ({"arch": "qwen2", "head_dim": 64}, "no head_dim of its own"),
        ({"arch": "bloom", "intermediate": 128}, "4 x hidden"),
        ({"shard_size": "many"}, "'many' is not a size"),
        ({"tokenizer": "/nowhere"}, "holds no tokenizer.json"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_checkpoint(tmp_path / "out", **TINY | options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_existing_weights_are_not_overwritten(tmp_path):
    make_checkpoint(tmp_path, **TINY)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds weights"):
        make_checkpoint(tmp_path, **TINY, seed=1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("preset", "parameters"), [("135m", 135e6), ("850m", 850e6), ("1gb", 500e6)])
def test_presets_have_their_size(tmp_path, monkeypatch, preset, parameters):
    written = {}
    monkeypatch.setattr(module, "_write_weights", lambda out_dir, shapes, *rest: written.update(shapes))
    assert module.main(["--preset", preset, str(tmp_path / "out")]) == 0
    assert sum(map(math.prod, written.values())) == pytest.approx(parameters, rel=0.03)


def test_command_line(tmp_path, capsys):
    shape = "--arch opt --layers 1 --hidden 64 --heads 4 --vocab 256 --word-embed-proj-dim 32 --no-layer-norm-before"
    assert module.main([*shape.split(), "--dtype", "float16", "--no-tokenizer", str(tmp_path / "out")]) == 0
    assert "1 shard(s)" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["word_embed_proj_dim"], config["do_layer_norm_before"], config["dtype"]) == (32, False, "float16")
    assert module.main(["--heads", "5", str(tmp_path / "bad")]) == 1
    assert "is not a multiple" in capsys.readouterr().err
