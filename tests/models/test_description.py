"""Checkpoints that others have quantized are refused in one sentence, wherever a model is named."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ds_llmpq.errors import UserError
from ds_llmpq.models.description import QUANT_METHOD, refuse_foreign, refuse_quantized
from ds_llmpq.plan import check_model

FOREIGN = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq'"),
    "awq": ({"quant_method": "awq", "bits": 4, "zero_point": True}, "'awq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
    "bitsandbytes, as once written": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
    "transformers' hqq": ({"quant_method": "hqq", "quant_config": {}}, "'hqq'"),
    "no dictionary": ("int4", "a method it does not name"),
}


def folder_with(tmp_path, **keys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | keys))
    return tmp_path


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_method_is_named(tmp_path, name):
    noted, words = FOREIGN[name]
    with pytest.raises(UserError) as raised:
        refuse_foreign(folder_with(tmp_path, quantization_config=noted))
    message = str(raised.value)
    assert f"is quantized by {words}, which is not read here" in message
    assert str(tmp_path) in message
    assert len(message.split(". ")) == 1


@pytest.mark.parametrize(
    "keys", [{}, {"quantization_config": None}, {"quantization_config": {"quant_method": QUANT_METHOD}}]
)
def test_full_precision_and_our_own_are_let_through(tmp_path, keys):
    refuse_foreign(folder_with(tmp_path, **keys))


def test_bits_are_chosen_for_full_precision_alone(tmp_path):
    refuse_quantized(folder_with(tmp_path))
    with pytest.raises(UserError, match=r"quantized already.* full-precision checkpoint"):
        refuse_quantized(folder_with(tmp_path, quantization_config={"quant_method": QUANT_METHOD}))
    with pytest.raises(UserError, match="'fp8', which is not read here"):
        refuse_quantized(folder_with(tmp_path, quantization_config={"quant_method": "fp8"}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", "[" * 200_000])
def test_a_damaged_file_is_left_to_who_reads_the_model(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refuse_foreign(tmp_path)
    refuse_foreign(tmp_path / "nowhere")


def test_plan_run_and_the_readers_of_weights_refuse_it(tmp_path):
    from ds_llmpq.models.config import ModelConfig
    from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
    from ds_llmpq.serving.config import PlanConfig
    from ds_llmpq.serving.planning import make_plan

    path = folder_with(tmp_path, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(UserError, match="'compressed-tensors', which is not read here"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="'compressed-tensors', which is not read here"):
        check_model(SimpleNamespace(model=None), path)
    with pytest.raises(UserError, match="'compressed-tensors', which is not read here"):
        make_plan(PlanConfig(model=ModelConfig(path=str(path))), tmp_path / "out")
