"""lm_head below 16 bits: the same numbers however it runs and wherever it comes from, and its bytes."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hqq.core.quantize import HQQLinear
from transformers import AutoModelForCausalLM

from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.step import Step
from ds_llmpq.quant import packing
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes, quantize_linear
from ds_llmpq.quant.kernel_linear import KernelLinear, RowBlocks
from ds_llmpq.quant.kernels.registry import KERNELS
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import Groups, cut_row_blocks, make_groups
from ds_llmpq.quant.pretrained import load_quantized
from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
from ds_llmpq.quant.recipe import read_recipe
from ds_llmpq.quant.writer import write_quantized
from scripts.make_checkpoint import make_checkpoint

CPU = torch.device("cpu")
SMALL = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 320, "max_positions": 64}
VARIANTS = {
    "llama": {"arch": "llama", "kv_heads": 2},
    "llama-tied": {"arch": "llama", "kv_heads": 2, "tied": True},
    "opt": {"arch": "opt", "word_embed_proj_dim": 32},
    "bloom": {"arch": "bloom"},
}
THERE = [
    "dequantize",
    *(name for name in ("openvino",) if importlib.util.find_spec(KERNELS[name].library)),
]
# relative, of single products: inputs rounded to 8 bits; bfloat16 in and out
TOLERANCE = {"openvino": 0.02, "dequantize": 0.01}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    made = {}

    def path(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = make_checkpoint(folder, tokenizer=None, seed=3, **SMALL, **VARIANTS[variant])
        return made[variant]

    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Cuts 320 rows into 128, 128 and 64."""
    monkeypatch.setattr(packing, "_BLOCK_WEIGHTS", 128 * 64)
    monkeypatch.setattr(packing, "_BLOCK_ROWS", 64)


def settings(bits, kernel="dequantize", **others):
    return QuantConfig([16], 32, 1, False, kernel, lm_head_bits=bits, **others)


def loader(checkpoint, quant, dtype=torch.float32):
    recipe = getattr(checkpoint, "recipe", None)
    return LayerLoader(checkpoint, list(recipe.bits) if recipe else [16, 16], quant, dtype, CPU)


def matrix_of(path, bits):
    """lm_head as HQQ's own numbers say it, quantized whole."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weight = model.get_output_embeddings().weight.data
    return quantize_linear(weight, None, bits, settings(bits), torch.float32, CPU).dequantize()


def product(module, matrix, dtype):
    inputs = torch.randn(5, matrix.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = module(inputs.to(dtype)).float()
    return found, inputs.to(dtype).float() @ matrix.T


def test_blocks_cover_a_matrix_and_bound_each():
    for rows, columns in (
        (1, 8),
        (64, 64),
        (32000, 1536),
        (128_256, 2048),
        (250_880, 1024),
        (50_272, 512),
        (7, 1 << 25),
    ):
        blocks = cut_row_blocks(rows, columns)
        assert sum(blocks) == rows
        assert all(block % 256 == 0 for block in blocks[:-1])
        assert all(block * columns <= max(1 << 24, 256 * columns) for block in blocks)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_in_blocks_it_is_the_matrix_that_hqq_makes_of_the_whole(path_of, small_blocks, variant, bits):
    path = path_of(variant)
    head = loader(Checkpoint(path), settings(bits)).head()
    assert isinstance(head.lm_head, RowBlocks)
    assert len(head.lm_head.blocks) == (2 if variant == "opt" else 3)  # opt's has half as many columns
    found, expected = product(head.lm_head, matrix_of(path, bits), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_every_kernel_multiplies_with_that_matrix_and_holds_what_the_memory_model_says(
    path_of, small_blocks, name, bits
):
    path, quant = path_of("llama-tied"), settings(bits, name)
    loading = loader(Checkpoint(path), quant, torch.bfloat16)
    embedding, head = loading.embedding(), loading.head()
    by_kernel = name != "dequantize" and bits in KERNELS[name].storage_bits
    assert isinstance(head.lm_head, KernelLinear if by_kernel else RowBlocks)
    found, expected = product(head.lm_head, matrix_of(path, bits), torch.bfloat16)
    assert (found - expected).norm() < TOLERANCE[name] * expected.norm()
    shape, kernel = read_shape(path), KERNELS[name]
    memory = MemoryModel(shape, make_groups(quant), 2, kernel, bits)
    assert not memory.shares_embedding
    held = memory.head_bytes() - kernel.head_buffer_bytes(shape.vocab, bits)  # unpacked, it is no graph
    assert (count_stored_bytes(embedding), count_stored_bytes(head)) == (memory.embed_bytes(), held)
    unquantized = MemoryModel(shape, Groups(32), 2, kernel)
    assert unquantized.shares_embedding
    assert unquantized.head_bytes() == unquantized.embed_bytes() + 64 * 2  # and the norm


def test_a_whole_stage_s_kernel_leaves_it_to_the_one_for_single_weights(path_of):
    pytest.importorskip("openvino")
    path = path_of("llama")
    quant = replace(settings(8, "openvino_graph"), bits=[8, 16])
    graph = LayerLoader(Checkpoint(path), [8, 8], quant, torch.bfloat16, CPU, stage=range(2))
    head = graph.head()
    assert isinstance(head.lm_head, KernelLinear)
    shape, kernel = read_shape(path), KERNELS["openvino_graph"]
    planned = MemoryModel(shape, Groups(32), 2, kernel, 8).head_bytes()
    assert count_stored_bytes(head) == planned - kernel.head_buffer_bytes(shape.vocab, 8)  # unpacked, it is no graph


def test_a_scored_row_has_logits_at_every_token(path_of, small_blocks):
    """[rows, tokens, vocabulary], as evaluation asks for them."""
    for name in THERE:
        loading = loader(Checkpoint(path_of("llama")), settings(4, name), torch.bfloat16)
        step = Step(torch.zeros(2, 3), None, 3, True, hidden=torch.ones(2, 3, 64, dtype=torch.bfloat16))
        assert loading.head()(step).logits.shape == (2, 3, 320)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_channel_bits", [[], [4]])
def test_a_quantized_checkpoint_holds_the_very_same(path_of, small_blocks, tmp_path, variant, per_channel_bits):
    path, quant = path_of(variant), settings(4, per_channel_bits=per_channel_bits)
    write_quantized(path, tmp_path, [16, 4], quant)
    assert read_recipe(tmp_path).lm_head_bits == 4
    assert fingerprint(tmp_path) == fingerprint(path)
    stored, direct = loader(open_checkpoint(tmp_path), quant), loader(Checkpoint(path), quant)
    for of in (stored, direct):
        of.bits = [16, 4]
    found, expected = (of.head().lm_head.blocks for of in (stored, direct))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, HQQLinear)
        assert torch.equal(one.dequantize(), other.dequantize())
    assert torch.equal(stored.embedding().state_dict().popitem()[1], direct.embedding().state_dict().popitem()[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_with_it(path_of, small_blocks, tmp_path, variant):
    path = path_of(variant)
    write_quantized(path, tmp_path, [16, 16], settings(4))
    model, plain = (
        load_quantized(tmp_path, torch.float32),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    )
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    head = plain.get_output_embeddings()
    plain.config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(matrix_of(path, 4))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=5e-4)


def test_blocks_are_read_as_they_were_written(path_of, small_blocks, tmp_path, monkeypatch):
    path, quant = path_of("llama"), settings(4)
    write_quantized(path, tmp_path, [16, 16], quant)
    assert read_recipe(tmp_path).head_rows == (128, 128, 64)
    monkeypatch.setattr(packing, "_BLOCK_WEIGHTS", 1 << 24)
    assert len(loader(open_checkpoint(tmp_path), quant).head().lm_head.blocks) == 3
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["head_rows"] = [128, 128]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="256 rows of lm_head instead of 320"):
        loader(open_checkpoint(tmp_path), quant).head()


def test_only_a_changed_head_is_written_anew(path_of, tmp_path):
    path = path_of("llama-tied")
    write_quantized(path, tmp_path / "plain", [4, 4], settings(16))
    for folder, bits in (("eight", 8), ("four", 4)):
        assert write_quantized(path, tmp_path / folder, [4, 4], settings(bits), reuse=tmp_path / "plain").reused == 3
    assert write_quantized(path, tmp_path / "back", [4, 4], settings(16), reuse=tmp_path / "plain").reused == 4


@pytest.mark.parametrize(("kept", "asked"), [(8, 16), (16, 8), (8, 4)])
def test_another_width_than_the_checkpoint_s_is_refused(path_of, tmp_path, kept, asked):
    write_quantized(path_of("llama"), tmp_path, [16, 16], settings(kept))
    with pytest.raises(UserError, match=f"lm_head is kept at {kept} bits .* but {asked} are asked for"):
        loader(open_checkpoint(tmp_path), settings(asked)).head()


def test_a_width_that_is_none_is_refused_before_anything_is_written(path_of, tmp_path):
    with pytest.raises(UserError, match="5 bits is not a packed width"):
        loader(Checkpoint(path_of("llama")), settings(5)).head()
    for bits in (5, 32):
        with pytest.raises(UserError, match=f"quant.lm_head_bits={bits}; it must be one of 1, 2, 3, 4, 8, 16"):
            write_quantized(path_of("llama"), tmp_path, [4, 4], settings(bits))
    with pytest.raises(UserError, match="lm_head of 320 x 64 cannot be packed"):
        write_quantized(path_of("llama"), tmp_path, [16, 16], replace(settings(4), group_size=24))
    assert not any(tmp_path.iterdir())
