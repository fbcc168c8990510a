"""What `run` prints: ten lines at most beside progress, the first answers among them."""

import json
import re

import pytest
from launching import completion, read_rows, run, write_rows

from ds_llmpq.commands.run import MOST_LINES

pytestmark = pytest.mark.launcher
PROGRESS = re.compile(r"(load|prompts|write): \d+ of \d+|planning \d+ s|calibration: timing")
CALIBRATION = 1  # lines that `planner.calibrate=never` saves


def lines(ended):
    return [line for line in (ended.stdout + ended.stderr).splitlines() if line and not PROGRESS.match(line)]


def test_the_demonstration_prints_ten_lines_and_what_planning_gains(tmp_path):
    ended = run("run", "+experiment=demo", f"out={tmp_path / 'out'}", "planner.calibrate=never")
    assert ended.returncode == 0, ended.stderr
    assert len(lines(ended)) + CALIBRATION <= MOST_LINES
    said = {line.partition(":")[0].partition(" ")[0]: line for line in ended.stdout.splitlines()}
    assert list(said)[:2] == ["plan", "Quantized"]
    assert {"requests", "measured", "predicted", "verdict", "answer"} <= said.keys()
    even = float(re.search(r"predicted: ([\d.]+) times the speed of equal numbers of layers", said["Gain"])[1])
    assert even > 1.2
    assert f"results: {tmp_path / 'out' / 'results.jsonl'}" in said["requests"]
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 32


def test_a_batch_of_ones_own_prints_ten_lines_with_three_answers(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [completion(f"row-{i}", f"def f{i}(x):", 8) for i in range(4)])
    keys = (f"input={rows}", "model=tiny", "planner.calibrate=never")
    ended = run("run", *keys, f"out={tmp_path / 'out'}")
    assert ended.returncode == 0, ended.stderr
    assert len(lines(ended)) + CALIBRATION <= MOST_LINES
    assert len(re.findall(r"^answer row-\d: def f\d\(x\): -> ", ended.stdout, re.MULTILINE)) >= 2
    whole = run("run", *keys, f"out={tmp_path / 'verbose'}", "-v")
    assert "origin of layer_seconds" in whole.stdout
    assert "weights predicted" in whole.stdout


def test_a_plan_and_the_run_of_its_workload_predict_the_same(tmp_path):
    """Prompts of the planned length with nothing in common, answers to their limit."""
    rows = [completion(f"row-{i}", [3 + 7 * i + k for k in range(24)], 8) for i in range(4)]
    for row in rows:
        row["body"]["ignore_eos"] = True
    shape = ["workload.sequences=4", "workload.prompt_tokens=24", "workload.generated_tokens=8"]
    keys = (f"input={write_rows(tmp_path / 'rows.jsonl', rows)}", "+experiment=demo", "planner.calibrate=never", *shape)
    ended = run("run", *keys, f"out={tmp_path / 'out'}")
    assert ended.returncode == 0, ended.stderr
    plan, metrics = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("plan", "metrics"))
    found = metrics["predicted_against_measured"]
    assert metrics["measured"]["generated_tokens"] == 32
    assert found["latency_seconds"]["predicted"] == pytest.approx(plan["run_seconds"], rel=1e-12)
    assert found["expected_before"]["latency_seconds"] == pytest.approx(plan["run_seconds"], rel=1e-12)
