"""What is said of a run with answers of one token, and of one whose pipeline ended before it reported."""

import json
import re
from dataclasses import replace

import pytest
from report_folders import write_planned, write_run

from ds_llmpq.plan import Deployment, read_plan, write_plan
from ds_llmpq.report.plan_table import describe_plan, format_plan
from ds_llmpq.report.run_report import write_run_report
from ds_llmpq.report.run_summary import format_run
from ds_llmpq.serving.metrics import summarize


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_answers_of_one_token_have_no_decode(tmp_path):
    write_run(tmp_path)
    metrics = read(tmp_path)
    metrics["predicted_against_measured"]["decode_seconds"] = {"predicted": 0.0, "measured": 0.0, "ratio": None}
    metrics["measured"]["decode_tokens_per_second"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = format_run(metrics)
    assert re.search(r"^predicted: \S+ tokens/s, in 0\.50 s \(prefill \S+ tokens/s, decode -\)$", text, re.MULTILINE)
    assert re.search(r"^verdict: the run took 1\.20 times .*\(prefill [\d.]+ times\)", text, re.MULTILINE)
    assert "decode: predicted 0.000 s, measured 0.000 s\n" in write_run_report(tmp_path, tmp_path / "page")


@pytest.mark.parametrize("failed", [0, 2])
def test_a_run_that_nobody_measured_has_counts_alone(tmp_path, failed):
    plan = write_planned(tmp_path)
    counts = {"total": 4, "completed": 4 - failed, "failed": failed}
    metrics = summarize(plan, counts, [], [], startup_seconds=0.0)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = format_run(metrics)
    assert f"4 in all, {4 - failed} completed, {failed} failed" in text
    assert "measured: nothing" in text
    assert "measured: nothing" in write_run_report(tmp_path, tmp_path / "page")


@pytest.mark.parametrize(
    ("latency", "decode", "expected"),
    [
        (1.0, 1.0, "1.00 times as long as predicted: the plan's times hold"),
        (1.15, 3.0, "1.15 times as long as predicted: the plan's times hold"),
        (0.9, 1.0, "0.90 times as long as predicted: the plan's times hold"),
        (1.5, 1.8, "1.50 times as long as predicted (decode 1.80 times): the plan's times are off; good for ranking"),
        (0.6, 0.5, "0.60 times as long as predicted (decode 0.50 times): the plan's times are off; good for ranking"),
        (7.5, 8.0, "7.50 times as long as predicted (decode 8.00 times): the plan's times are off; do not trust them"),
    ],
)
def test_the_verdict_follows_the_whole_run_and_names_the_phase_that_was_off(tmp_path, latency, decode, expected):
    write_run(tmp_path)
    metrics = read(tmp_path)
    found = metrics["predicted_against_measured"]
    for phase, ratio in (("latency", latency), ("prefill", 1.1), ("decode", decode)):
        found[f"{phase}_seconds"] = {"predicted": 2.0, "measured": 2.0 * ratio, "ratio": ratio}
    metrics["measured"] |= {"generated_tokens": 30, "prompt_tokens": 100, "rows": 10}
    lines = format_run(metrics).splitlines()
    assert lines[2] == "predicted: 15 tokens/s, in 2.00 s (prefill 50 tokens/s, decode 10)"
    assert lines[3].startswith(f"verdict: the run took {expected}")
    assert len(lines) == 4
    assert metrics["stages"][0]["device"] in format_run(metrics, verbose=True)


def test_prices_become_the_cost_of_a_million_tokens(tmp_path):
    write_run(tmp_path)
    plan = read_plan(tmp_path / "plan.json")
    assert plan.compute_cost(3600.0, 1, 1) is None
    stages = tuple(replace(stage, host="a", kind="cpu", slot=j) for j, stage in enumerate(plan.stages))
    plan = replace(plan, stages=stages, deployment=Deployment("float32", price_per_hour=3.0))
    cost = plan.compute_cost(1800.0, prompt_tokens=2_000_000, generated_tokens=1_000_000)
    assert cost == {"price_per_hour": 3.0, "total": 1.5, "per_million_generated_tokens": 1.5, "per_million_tokens": 0.5}
    said = "1.5 in all at 3 an hour; per million tokens 1.5 (generated ones alone), 0.5 (prompts counted too)"
    metrics = read(tmp_path) | {"cost": cost}
    assert f"cost while serving: {said}" in format_run(metrics)
    for text in (format_plan(plan), describe_plan(plan)):
        assert re.search(r"^cost: \S+ in all at 3 an hour; per million tokens \S+ \(generated", text, re.MULTILINE)
    write_plan(tmp_path / "plan.json", plan)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert said in write_run_report(tmp_path, tmp_path / "page")
    assert said in (tmp_path / "page" / "report.html").read_text()
