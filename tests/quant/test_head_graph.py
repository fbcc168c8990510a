"""Norm and lm_head behind a stage's graph, against the same in float64."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes
from ds_llmpq.quant.kernels.linears import lm_head_bytes
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.onednn_linear import computes_in_bfloat16
from ds_llmpq.quant.packing import make_groups

if not importlib.util.find_spec("openvino") or not computes_in_bfloat16():
    pytest.skip("needs OpenVINO, and a processor with bfloat16 arithmetic", allow_module_level=True)

CPU, LAYERS = torch.device("cpu"), 2
SIZES = {"layers": LAYERS, "hidden": 128, "heads": 4, "vocab": 192, "max_positions": 64, "dtype": "bfloat16"}
ERROR = {torch.bfloat16: 0.006, torch.float32: 1e-6}  # of the norm; torch's own head in bfloat16: 0.004


@pytest.fixture(scope="module")
def loader_of(tmp_path_factory):
    from scripts.make_checkpoint import make_checkpoint

    def get(arch, dtype=torch.bfloat16, lm_head_bits=16, **config):
        path = make_checkpoint(tmp_path_factory.mktemp(arch), tokenizer=None, seed=1, arch=arch, config=config, **SIZES)
        quant = QuantConfig([16], 32, 1, False, "openvino_graph", lm_head_bits=lm_head_bits)
        return LayerLoader(Checkpoint(path), [16] * LAYERS, quant, dtype, CPU, packed=True, stage=range(LAYERS))

    return get


def step_of(hidden, last=None):
    positions = torch.zeros(hidden.shape[:2], dtype=torch.long)
    return Step(positions, None, 1, True, hidden=hidden, last=last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3_text"])  # three kinds of norm
@torch.inference_mode()
def test_logits_are_those_of_the_head(loader_of, arch, dtype):
    loader = loader_of(arch, dtype, tie_word_embeddings=False)
    ours, theirs = loader.head(), replace(loader, packed=False).head().double()
    assert type(ours).__name__ == "HeadGraph"
    torch.manual_seed(0)
    for rows, tokens in ((1, 1), (8, 1), (3, 5), (70, 1)):  # 70: in three calls
        hidden = torch.randn(rows, tokens, SIZES["hidden"]).to(dtype)
        for last in (None, torch.arange(rows) % tokens):
            found, expected = ours(step_of(hidden, last)).logits, theirs(step_of(hidden.double(), last)).logits
            assert found.dtype == torch.float32
            assert found.shape == expected.shape
            assert (found - expected).norm() <= ERROR[dtype] * expected.norm()
    steps = [step_of(torch.randn(2, 3, SIZES["hidden"]).to(dtype), torch.tensor([2, 0])), step_of(hidden)]
    alone = [ours(replace(step)).logits for step in steps]
    ours(steps)
    for step, expected in zip(steps, alone, strict=True):
        assert (step.logits - expected).norm() <= ERROR[dtype] * expected.norm()


@torch.inference_mode()
def test_a_row_that_is_no_number_spoils_no_other(loader_of):
    head = loader_of("llama", tie_word_embeddings=False).head()
    hidden = torch.randn(4, 1, SIZES["hidden"]).bfloat16()
    sound = head(step_of(hidden)).logits
    hidden[2] = torch.nan
    found = head(step_of(hidden)).logits
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], sound[[0, 1, 3]])


def test_heads_that_share_or_cap_stay_torch_s(loader_of):
    tied = loader_of("llama", tie_word_embeddings=True)
    tied.embedding()
    assert type(tied.head()).__name__ == "Head"
    capped = loader_of("gemma2", final_logit_softcapping=30.0, attn_logit_softcapping=None, tie_word_embeddings=False)
    assert type(capped.head()).__name__ == "Head"


def test_bytes_are_those_of_the_plain_weights_and_buffers(loader_of):
    loader = loader_of("llama", tie_word_embeddings=False)
    buffers = loader.kernel.head_buffer_bytes(SIZES["vocab"], 16)
    assert count_stored_bytes(loader.head()) - buffers == count_stored_bytes(replace(loader, packed=False).head())


@torch.inference_mode()
def test_logits_have_the_same_memory_unless_earlier_ones_are_in_use(loader_of):
    head = loader_of("llama", tie_word_embeddings=False).head()
    hidden = torch.randn(40, 1, SIZES["hidden"]).bfloat16()
    first = head(step_of(hidden)).logits
    kept, place = first.clone(), first.data_ptr()
    other = head(step_of(-hidden)).logits
    assert torch.equal(first, kept)
    assert other.data_ptr() != place
    part = first[3:]
    del first
    assert head(step_of(hidden)).logits.data_ptr() != place
    del part
    again = head(step_of(hidden[:5])).logits
    assert again.data_ptr() == place
    assert (again - kept[:5]).norm() <= ERROR[torch.bfloat16] * kept[:5].norm()


@pytest.mark.parametrize("bits", [8, 4, 3])
@torch.inference_mode()
def test_a_quantized_lm_head_is_part_of_the_graph(loader_of, bits):
    """Against HQQ's dequantized weights in float64: only inputs are rounded, to 8 bits."""
    loader = loader_of("llama", lm_head_bits=bits, tie_word_embeddings=False)
    exact = replace(loader, packed=False, quant=replace(loader.quant, kernel="dequantize"), dtype=torch.float32)
    ours, theirs = loader.head(), exact.head()
    assert type(ours).__name__ == "HeadGraph"
    torch.manual_seed(0)
    hidden = torch.randn(40, 1, SIZES["hidden"]).bfloat16()
    found, expected = ours(step_of(hidden)).logits, theirs(step_of(hidden.float())).logits
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 0.012 * expected.norm()
    size = (SIZES["vocab"], SIZES["hidden"])
    held = lm_head_bytes(loader.kernel, *size, bits, make_groups(loader.quant), 2)
    held += loader.kernel.head_buffer_bytes(SIZES["vocab"], bits)
    assert count_stored_bytes(ours) == held + SIZES["hidden"] * 2


def test_a_quantized_lm_head_of_2_bits_stays_a_product(loader_of):
    head = loader_of("llama", lm_head_bits=2, tie_word_embeddings=False).head()
    assert type(head).__name__ == "Head"
