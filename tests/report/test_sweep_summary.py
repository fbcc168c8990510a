"""summary.csv of a sweep as a spreadsheet opens it: texts from outside are no formulas, numbers stay numbers."""

import csv

import pytest

from ds_llmpq.report.sweep import write_summary

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
