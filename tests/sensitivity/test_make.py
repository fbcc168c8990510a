"""sensitivity.json from a checkpoint, end to end: columns sum to what the whole model loses; mistakes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM

from ds_llmpq.errors import UserError
from ds_llmpq.models.corpus import read_calibration_texts, select_rows
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import quantize_linear
from ds_llmpq.sensitivity.config import CalibrationConfig
from ds_llmpq.sensitivity.layerwise import LossIncrease
from ds_llmpq.sensitivity.make import METHODS, SensitivityRequest, loss_per_kl, make_sensitivity, scale_to_loss
from ds_llmpq.sensitivity.table import read_sensitivity, write_sensitivity
from scripts.make_checkpoint import make_checkpoint

SMALL = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 2048, "max_positions": 32}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", seed=5, **SMALL)


def request(path, folder, method="variance", bits=(2, 4, 16), calibration=None, group_size=64):
    quant = QuantConfig(list(bits), group_size, 1, True)
    calibration = calibration or CalibrationConfig(rows=2, tokens=16, hessian_rows=1)
    return SensitivityRequest(path, method, quant, calibration, 0, torch.device("cpu"), folder)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_table_in_nats(path, tmp_path, method):
    table = make_sensitivity(request(path, tmp_path, method))
    write_sensitivity(tmp_path / "sensitivity.json", table)
    assert read_sensitivity(tmp_path / "sensitivity.json") == table
    assert (table.method, table.bits, table.layers) == (method, (2, 4), 2)
    table.check_model(2, fingerprint(path))
    for column, bits in enumerate(table.bits):
        whole = table.details["whole_model"][str(bits)]
        assert sum(row[column] for row in table.table) == pytest.approx(whole["target"])
        assert whole["target"] == pytest.approx(table.details["loss_per_kl"] * whole["kl"])
    assert table.details["peak_memory_bytes"] > 1 << 20


def test_per_channel_are_noted_and_measured(path, tmp_path):
    asked = request(path, tmp_path / "rows", bits=(8, 16))
    plain = make_sensitivity(request(path, tmp_path / "groups", bits=(8, 16)))
    rows = make_sensitivity(replace(asked, quant=replace(asked.quant, per_channel_bits=[8])))
    groups = {"group_size": 64, "axis": 1, "per_channel_bits": []}
    assert plain.details["quant"] == groups | {"optimize": True, "zeros": "whole"}
    assert rows.details["quant"] == plain.details["quant"] | {"per_channel_bits": [8]}
    assert rows.table != plain.table


def test_what_lm_head_loses_is_measured_and_changes_no_layer_s(path, tmp_path):
    asked = request(path, tmp_path / "head", bits=(4, 2, 16))
    plain, low = (
        make_sensitivity(replace(asked, folder=tmp_path / str(bits), quant=replace(asked.quant, lm_head_bits=bits)))
        for bits in (16, 3)
    )
    assert list(plain.head) == [4, 2], "those of the layers' widths, so that one table serves a sweep"
    assert list(low.head) == [4, 3, 2]
    assert low.table == plain.table
    rows, _ = select_rows(read_calibration_texts(None), load_tokenizer(str(path)), 2, 16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        exact = model(rows[:, :-1]).logits.log_softmax(-1)
        weight = model.get_output_embeddings().weight
        quant = replace(asked.quant, zeros="whole")
        quantized = quantize_linear(weight.data, None, 2, quant, torch.float32, torch.device("cpu")).dequantize()
        weight.data = quantized
        found = model(rows[:, :-1]).logits.log_softmax(-1)
    kl = (exact.exp() * (exact - found)).sum(-1).double().mean().item()
    assert plain.head[2] == low.head[2]
    assert low.head[2] == pytest.approx(low.details["loss_per_kl"] * kl, rel=1e-3)


def test_an_lm_head_that_cannot_be_is_named_before_anything_is_measured(path, tmp_path):
    asked = request(path, tmp_path)
    with pytest.raises(UserError, match=r"quant\.lm_head_bits=7; it must be one of"):
        make_sensitivity(replace(asked, quant=replace(asked.quant, lm_head_bits=7)))
    assert not list(tmp_path.glob("progress*"))


def test_ratio_of_loss_and_divergence():
    exact = [LossIncrease(0.3, 0.01, 0.2), LossIncrease(0.003, 0.01, 0.002)]
    assert loss_per_kl(exact) == pytest.approx(1.5)
    assert loss_per_kl([LossIncrease(9.0, 0.01, 0.2)]) == 2.0
    assert loss_per_kl([LossIncrease(0.0, 0.0, 0.0)]) == 1.0
    table, notes = scale_to_loss([[1.0, 0.0], [3.0, 0.0]], exact)
    assert table == [[pytest.approx(0.075), pytest.approx(0.0015)], [pytest.approx(0.225), pytest.approx(0.0015)]]
    assert notes[0]["raw_sum"] == 4.0


def test_mistakes(path, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("few words")
    for change, words in {
        "method": ("guess", "method='guess' is unknown"),
        "bits": ((16,), "no width below 16"),
        "group_size": (48, "cannot be kept at 2 bits"),
        "calibration": (CalibrationConfig(text=str(text)), "too short for 28 rows of 512 tokens"),
    }.items():
        with pytest.raises(UserError, match=words[1]):
            make_sensitivity(request(path, tmp_path, **{change: words[0]}))
    with pytest.raises(UserError, match=r"none cannot be read .*give a plain text file in UTF-8"):
        make_sensitivity(request(path, tmp_path, calibration=CalibrationConfig(text=str(tmp_path / "none"))))
    with pytest.raises(UserError, match="longer than the model's 32 positions"):
        make_sensitivity(request(path, tmp_path, calibration=CalibrationConfig(rows=1, tokens=33)))
