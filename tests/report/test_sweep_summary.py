"""summary.csv of a sweep as a spreadsheet opens it: texts from outside are no formulas, numbers stay numbers."""

import csv

import pytest

from ds_llmpq.plan import BASELINES
from ds_llmpq.report.sweep import build_table, format_summary, write_summary

POINT = {"throughput_tokens_per_second": -1.5, "quality_loss": 1e-9, "exit_code": 2}


@pytest.mark.parametrize("text", ["=1+2", "+1-A2", "-2+A1", "@SUM(A1)", " =1", "\n=1", "=cmd|' /C calc'!A0"])
def test_no_cell_is_a_formula(tmp_path, text):
    """Neither in a column's name nor in an override, nor in what a failed point says."""
    write_summary(tmp_path, [POINT | {"point": text, "overrides": {text: text, "quant.bits": text}, "failure": text}])
    header, row = csv.reader((tmp_path / "summary.csv").open(newline=""))
    assert [cell for cell in (*header, *row) if cell.lstrip("\t\r\n ")[:1] in ("=", "+", "@")] == []
    assert dict(zip(header, row, strict=True))["quant.bits"].lstrip("'\n ") == text.strip()
    assert [cell for cell in row if cell.lstrip()[:1] == "-"] == ["-1.5"]


@pytest.mark.parametrize("number", ["-1", "+2.5", "-1e-3", "7", "-0.5E+6"])
def test_numbers_stay_numbers(tmp_path, number):
    write_summary(tmp_path, [POINT | {"point": "0", "overrides": {"planner.theta": number}, "failure": "no"}])
    header, row = csv.reader((tmp_path / "summary.csv").open(newline=""))
    found = dict(zip(header, row, strict=True))
    assert found["planner.theta"] == number
    assert float(found["throughput_tokens_per_second"]) == -1.5
    assert float(found["quality_loss"]) == 1e-9


def point(name, speed, measured):
    empty = dict.fromkeys((*BASELINES, "latency_seconds", "quality_loss", "measured_quality_loss", "stages", "widths"))
    speeds = {"throughput_tokens_per_second": speed, "measured_throughput_tokens_per_second": measured}
    return empty | speeds | {"point": name, "overrides": {"planner.baseline": name}, "gap": None, "failure": None}


def test_a_baseline_that_is_faster_shows_what_that_costs():
    ours = dict.fromkeys((*BASELINES, "latency_seconds", "stages", "widths")) | POINT | {"point": "0", "overrides": {}}
    ours |= {"throughput_tokens_per_second": 30.0, "uniform": 40.0, "pipeedge": 20.0, "failure": None, "gap": 0.01}
    head, [row] = build_table([ours | {"baseline_losses": {"uniform": 0.054, "pipeedge": 0.0}}])
    cells = dict(zip(head, row, strict=True))
    assert cells["uniform"] == "40 (0.75x, loss 0.054)"
    assert cells["pipeedge"] == "20 (1.50x)"
    assert cells["gap"] == "1 %"


def test_swept_baselines_are_compared_as_they_were_measured():
    points = [point("null", 30.0, 24.0), point("uniform", 20.0, 12.0), point("pipeedge", 25.0, None)]
    points.append(point("flexgen", None, None) | {"failure": "an estimate"})
    text = format_summary(points)
    assert "speed-up over uniform: measured 2.00x, predicted 1.50x" in text
    assert "speed-up over pipeedge: predicted 1.20x" in text
    assert "speed-up over flexgen: it has no plan" in text
    head, rows = build_table(points)
    assert head[:2] == ["point (planner.baseline)", "tokens/s"]
    assert not set(BASELINES) & set(head)
    assert [row[0] for row in rows] == ["ours", "uniform", "pipeedge", "flexgen"]
    assert rows[0][head.index("measured")] == "24"
