"""`ds-llmpq simulate` from the command line: reference mode, one run, a sweep with its comparison."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[1] / "research" / "data" / "published_schedules.json"


def simulate(*arguments):
    command = [sys.executable, "-m", "ds_llmpq", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_reference_mode_writes_one_completion_a_case(tmp_path):
    result = simulate("mode=reference", f"cases={CASES}", f"out={tmp_path}")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "completions.json").read_text())
    expected = [row["completion"] for row in json.loads(CASES.read_text())]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {name: pytest.approx(ends, abs=1e-6, rel=0) for name, ends in other.items()} == one


def test_a_run_writes_metrics_and_a_mistake_is_one_line(tmp_path):
    result = simulate("jobs=200", "repeats=2", "batching=continuous", "arrivals=gamma", f"out={tmp_path}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())["policies"]
    assert metrics["sjf"]["jct_mean_seconds"] <= metrics["fcfs"]["jct_mean_seconds"]
    head, _, *rows = (re.split(r"  +", line) for line in result.stdout.splitlines()[:5])
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    makespan = metrics["sjf"]["makespan_seconds"]
    assert float(shown["sjf"]["makespan, s"].replace(",", "")) == pytest.approx(makespan, rel=1e-3)
    wrong = simulate("mode=reference", f"out={tmp_path}/wrong")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "cases=FILE" in wrong.stderr


@pytest.mark.slow
def test_the_papers_comparison_is_one_command(tmp_path):
    small = ["jobs=60", "repeats=2", "batching=none,static", "arrivals.load=0.5,0.9", "arrivals.cv=1,3"]
    result = simulate("-m", "comparison=ssjf", *small, f"out={tmp_path}")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "comparison.md").read_text()
    assert "Where the published throughput gain comes from" in text
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1 + 2 * 2 * 2 * 3
    for name in ("jct_against_load.png", "throughput_against_load.png", "jct_against_cv.png"):
        assert (tmp_path / name).stat().st_size > 1000
