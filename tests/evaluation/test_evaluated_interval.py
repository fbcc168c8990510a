"""The loss that a plan states, with its interval, against what `evaluate` finds on texts it was not calibrated on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_llmpq.models.corpus import EVALUATION, read_text

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.launcher, pytest.mark.timeout(1800)]


def call(folder, *arguments):
    subprocess.run([sys.executable, "-m", "ds_llmpq", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two plans, one of 4 and 16 bits within the default bound, one of 4 bits; three texts."""
    folder = tmp_path_factory.mktemp("interval")
    call(folder, "sensitivity", "model=tiny", "quant.bits=[3,4,8]", "out=sensitivity")
    known = ["planner.sensitivity=sensitivity/sensitivity.json", "planner.calibrate=never", "+experiment=demo"]
    call(folder, "plan", *known, "quant.bits=[4,16]", "out=usual")
    call(folder, "plan", *known, "quant.bits=[3,4]", "planner.max_quality_loss=null", "out=low")
    manuals = sorted((ROOT / "docs").glob("*.md"))
    (folder / "manual.txt").write_text("\n\n".join(file.read_text(encoding="utf-8") for file in manuals), "utf-8")
    (folder / "licence.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), "utf-8")
    (folder / "code.txt").write_text(read_text(None, EVALUATION).text, "utf-8")
    return folder


@pytest.mark.parametrize("text", ["manual", "licence", "code"])
@pytest.mark.parametrize("plan", ["usual", "low"])
def test_the_interval_covers_what_evaluate_finds(folder, plan, text):
    out = f"{plan}_{text}"
    limited = [f"evaluation.text={text}.txt", "evaluation.limit_tokens=4096"]
    call(folder, "evaluate", f"plan={plan}/plan.json", *limited, f"out={out}")
    found = json.loads((folder / out / "scores.json").read_text())["loss_increase"]
    low, high = found["predicted_interval"]
    noise = 2 * found["standard_error"]
    assert low - noise <= found["measured"] <= high + noise
    assert noise < (high - low) / 3  # else it would say nothing
    assert 0 < found["predicted"] < 0.2
