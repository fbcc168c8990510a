"""What `run` prints: ten lines at most beside progress, the first answers among them."""

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
