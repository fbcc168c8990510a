"""What is said of a run with answers of one token, and of one whose pipeline ended before it reported."""

import json

import pytest
from report_folders import write_planned, write_run

from ds_llmpq.report.run_report import write_run_report
from ds_llmpq.report.run_summary import run_summary
from ds_llmpq.serving.metrics import summarize


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_answers_of_one_token_have_no_decode(tmp_path):
    write_run(tmp_path)
    metrics = read(tmp_path)
    metrics["predicted_against_measured"]["decode_seconds"] = {"predicted": 0.0, "measured": 0.0, "ratio": None}
    metrics["measured"]["decode_tokens_per_second"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert "predicted against measured decode: 0.000 s against 0.000 s\n" in run_summary(metrics)
    assert "decode: predicted 0.000 s, measured 0.000 s\n" in write_run_report(tmp_path, tmp_path / "page")


@pytest.mark.parametrize("failed", [0, 2])
def test_a_run_that_nobody_measured_has_counts_alone(tmp_path, failed):
    plan = write_planned(tmp_path)
    counts = {"total": 4, "completed": 4 - failed, "failed": failed}
    metrics = summarize(plan, counts, [], None, [], startup_seconds=0.0)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = run_summary(metrics)
    assert f"4 in all, {4 - failed} completed, {failed} failed" in text
    assert "measured: nothing" in text
    assert "measured: nothing" in write_run_report(tmp_path, tmp_path / "page")
