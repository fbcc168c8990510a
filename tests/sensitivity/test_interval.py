"""The interval of an expected loss holds on texts that nothing was calibrated on."""

import subprocess
from pathlib import Path

import pytest
import torch

from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.corpus import (
    EVALUATION,
    Text,
    read_calibration_texts,
    read_text,
    select_calibration_rows,
    select_rows,
)
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.sensitivity.layerwise import Layerwise, LossIncrease, measure
from ds_llmpq.sensitivity.make import estimate_spread, loss_per_kl
from ds_llmpq.sensitivity.table import Sensitivity

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"


def losses(rows, bits):
    model = Layerwise(Checkpoint(TINY), QuantConfig(), rows, torch.device("cpu"))
    found = measure(model, [(width,) * model.layers for width in bits])
    return [found[(width,) * model.layers] for width in bits]


def markdown():
    listed = subprocess.run(["git", "ls-files", "docs/*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in listed.stdout.split())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_interval_covers_three_texts_it_was_not_calibrated_on():
    tokenizer, bits = load_tokenizer(str(TINY)), (8, 4, 3)
    rows, kinds = select_rows(read_calibration_texts(None), tokenizer, 28, 256)
    measured = losses(rows, bits)
    ratio = loss_per_kl(measured)
    spread = estimate_spread(measured, ratio, kinds)
    table = Sensitivity("x", "fitted", bits, ((0.0,) * len(bits),), details={"text_spread": spread})
    licence = Text("licence", (ROOT / "LICENSE").read_text(encoding="utf-8"))
    for text, count in ((read_text(None, EVALUATION), 8), (Text("markdown", markdown()), 8), (licence, 8)):
        for expected, found in zip(
            measured, losses(select_calibration_rows(text, tokenizer, count, 256), bits), strict=True
        ):
            low, high = table.interval(ratio * expected.kl)
            assert low <= found.loss <= high, (text.name, low, found, high)
    assert spread < 0.7  # wide on a model that knows code alone, yet no wider than the kinds differ


def test_the_spread_is_student_s_over_the_kinds():
    """By hand: two rows a kind, deviations of -0.01, 0 and 0.01 from an expected 0.04."""
    by_row = (0.03, 0.03, 0.05, 0.03, 0.05, 0.05)
    spread = estimate_spread([LossIncrease(0.04, 0.001, 0.04, by_row)], 1.0, [0, 0, 1, 1, 2, 2])
    assert spread == pytest.approx(4.302653 * (0.0002 / 0.04 / 2 * (4 / 3)) ** 0.5, rel=1e-6)
    much = LossIncrease(2.0, 0.001, 2.0, (9.0,) * 6)
    assert estimate_spread([LossIncrease(0.04, 0.001, 0.04, by_row), much], 1.0, [0, 0, 1, 1, 2, 2]) == spread
    assert estimate_spread([much], 1.0, [0, 0, 1, 1, 2, 2]) is None
    assert estimate_spread([LossIncrease(0.04, 0.001, 0.04, by_row)], 1.0, [0, 0, 0, 1, 1, 1]) is None


def test_kinds_take_turns_and_short_texts_give_what_they_have():
    class Letters:
        def __call__(self, text, verbose):
            return {"input_ids": [ord(letter) for letter in text]}

    texts = [Text("a", "a" * 100), Text("b", "b" * 12), Text("c", "c" * 100)]
    rows, kinds = select_rows(texts, Letters(), 8, 10)
    assert kinds == [0, 1, 2, 0, 2, 0]
    assert [chr(row[0]) for row in rows] == ["abc"[kind] for kind in kinds]
    assert select_rows(texts, Letters(), 2, 10)[1] == [0, 1]
    rows, kinds = select_rows([Text("a", "a" * 200)], Letters(), 16, 10)
    assert kinds == sorted([*range(8), *range(8)])
