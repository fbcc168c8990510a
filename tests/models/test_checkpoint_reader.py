"""The safetensors reader: every tensor of every layout, and one clear sentence for each kind of damage."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from scripts.make_checkpoint import make_checkpoint

INDEX = "model.safetensors.index.json"
TINY = {"layers": 2, "hidden": 32, "heads": 2, "vocab": 64, "tokenizer": None}
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "single": make_checkpoint(folder / "single", **TINY),
        "sharded": make_checkpoint(folder / "sharded", shard_size="10KB", **TINY),
        "bloom": make_checkpoint(folder / "bloom", "bloom", **TINY),
        "opt": make_checkpoint(folder / "opt", "opt", **TINY),
    }


@pytest.fixture
def copy_of(originals, tmp_path):
    def copy(name):
        return Path(shutil.copytree(originals[name], tmp_path / name))

    return copy


def stored(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_all(path):
    """Opens the checkpoint and reads all its tensors, as a rank with all layers does."""
    checkpoint = Checkpoint(path)
    names = list(checkpoint._shard_of)
    return dict(checkpoint.tensors(names))


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_reads_what_safetensors_reads(originals, name):
    found, wanted = read_all(originals[name]), stored(originals[name])
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    assert Checkpoint(originals[name]).shape(QUERY) == (32, 32)


def test_shards_hold_more_than_one_file_and_the_same_tensors(originals):
    assert len(list(originals["sharded"].glob("*.safetensors"))) > 3
    single, sharded = stored(originals["single"]), stored(originals["sharded"])
    assert all(torch.equal(single[name], sharded[name]) for name in single | sharded)


def test_tensors_outlive_the_file(copy_of):
    """What was read is in memory of its own: no page of the file stays mapped."""
    path = copy_of("single")
    tensors = dict(Checkpoint(path).tensors([QUERY]))
    before = tensors[QUERY].clone()
    (path / "model.safetensors").write_bytes(b"\xff" * (path / "model.safetensors").stat().st_size)
    assert torch.equal(tensors[QUERY], before)
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("name", "prefix"), [("single", "model."), ("opt", "model."), ("bloom", "transformer.")])
def test_names_without_the_base_model_s_prefix(copy_of, name, prefix):
    path = copy_of(name)
    tensors = stored(path)
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(path)
    for key, tensor in checkpoint.tensors(list(tensors)):
        assert torch.equal(tensor, tensors[key])


def truncate(path):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 100)


def first_shard(path):
    return sorted(path.glob("model-*.safetensors"))[0]


DAMAGE = {
    "no folder": ("single", shutil.rmtree, "does not exist"),
    "no config": ("single", lambda path: (path / "config.json").unlink(), "has no config.json"),
    "config is no JSON": ("single", lambda path: (path / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": ("single", lambda path: (path / "config.json").write_text("[1]"), "must be an object"),
    "config is binary": (
        "single",
        lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"),
        "is not UTF-8 text",
    ),
    "config is of no known model": (
        "single",
        lambda path: (path / "config.json").write_text('{"model_type": "parrot"}'),
        "model_type 'parrot' is not supported",
    ),
    "config has a wrong type": (
        "single",
        lambda path: (path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}'),
        "hidden_size is 'many', but must be a valid integer",
    ),
    "no weights": ("single", lambda path: (path / "model.safetensors").unlink(), "only safetensors"),
    "other weights": (
        "single",
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "only safetensors",
    ),
    "truncated file": ("single", lambda path: truncate(path / "model.safetensors"), "is damaged or unreadable"),
    "empty file": ("single", lambda path: (path / "model.safetensors").write_bytes(b""), "is damaged or unreadable"),
    "not safetensors": (
        "single",
        lambda path: (path / "model.safetensors").write_bytes(b"GGUF" + bytes(range(256)) * 9),
        "is damaged or unreadable",
    ),
    "missing shard": ("sharded", lambda path: first_shard(path).unlink(), "is missing; the index names it"),
    "truncated shard": ("sharded", lambda path: truncate(first_shard(path)), "is damaged or unreadable"),
    "shard is a folder": (
        "sharded",
        lambda path: (first_shard(path).rename(path / "gone"), (path / "model-00001-of-00009.safetensors").mkdir()),
        "it is a folder",
    ),
    "index is no JSON": ("sharded", lambda path: (path / INDEX).write_text("weights"), "cannot be read as JSON"),
    "index is a list": ("sharded", lambda path: (path / INDEX).write_text("[1, 2]"), "is [1, 2], but must be"),
    "index is a number": ("sharded", lambda path: (path / INDEX).write_text("5"), "is 5, but must be"),
    "index is binary": ("sharded", lambda path: (path / INDEX).write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
    "index without map": ("sharded", lambda path: (path / INDEX).write_text("{}"), "lacks the key 'weight_map'"),
    "map is a list": (
        "sharded",
        lambda path: (path / INDEX).write_text('{"weight_map": ["a"]}'),
        "weight_map is ['a'], but must be an object",
    ),
    "index is very deep": (
        "sharded",
        lambda path: (path / INDEX).write_text("[" * 200_000),
        "is nested more than 64 levels deep",
    ),
    "index names another tensor": (
        "sharded",
        lambda path: edit_index(path, lambda names: names.update({"ghost": names[QUERY]})),
        "is damaged or unreadable",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_sentence(copy_of, kind):
    name, damage, words = DAMAGE[kind]
    path = copy_of(name)
    damage(path)
    with pytest.raises(UserError) as raised:
        read_all(path)
    message = str(raised.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message.removesuffix(" Fetch the checkpoint again.").split(". ")) == 1
    assert len(message) < 500 + len(str(path))
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\0b", "./x.safetensors"]
)
def test_an_index_names_no_file_outside_the_folder(copy_of, shard, tmp_path):
    path = copy_of("sharded")
    (path / "sub").mkdir()
    for other in (tmp_path / "secret.safetensors", path / "sub" / "model.safetensors", path / "x.safetensors"):
        shutil.copy(first_shard(path), other)
    edit_index(path, lambda names: names.update({QUERY: shard}))
    with pytest.raises(
        UserError, match=r"must lie in the checkpoint's folder|is missing|no control characters|at least 1 character"
    ):
        read_all(path)


def test_a_tensor_that_is_not_there(copy_of):
    path = copy_of("sharded")
    edit_index(path, lambda names: names.pop(QUERY))
    with pytest.raises(UserError, match=rf"has no tensor '{QUERY}'; it is incomplete"):
        list(Checkpoint(path).tensors([QUERY]))
    with pytest.raises(UserError, match="has no tensor"):
        Checkpoint(path).shape(QUERY)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_weights_that_another_program_has_quantized(copy_of, dtype):
    path = copy_of("single")
    tensors = stored(path)
    tensors[QUERY] = tensors[QUERY].to(dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"stored as {kind}; give the full-precision checkpoint"):
        list(Checkpoint(path).tensors([QUERY]))


def test_an_unsupported_architecture_is_said(copy_of):
    path = copy_of("single")
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"'gpt2' is not supported; supported are llama, .*qwen2, .*opt, bloom"):
        Checkpoint(path)


def test_the_text_side_of_a_checkpoint_has_a_fingerprint_of_its_own(tmp_path):
    from ds_llmpq.models.fingerprint import fingerprint_text

    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint_text(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert fingerprint_text(tmp_path) == before
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    penalised = fingerprint_text(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    assert len({before, penalised, fingerprint_text(tmp_path)}) == 3
