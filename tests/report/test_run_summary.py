"""What is said of a run with answers of one token, and of one whose pipeline ended before it reported."""

import json
import re
import time
from dataclasses import replace

import pytest
from report_folders import write_planned, write_run

from ds_llmpq.engine.processor_use import ProcessorUse
from ds_llmpq.plan import ESTIMATES, Deployment, PassTimes, read_plan, write_plan
from ds_llmpq.report.plan_table import describe_plan, format_plan
from ds_llmpq.report.run_report import write_run_report
from ds_llmpq.report.run_summary import format_run, judge_times
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.stream import SequenceLengths, StreamTimes
from ds_llmpq.serving.metrics import expect, share_processors, summarize
from ds_llmpq.serving.prediction import simulate_streams
from ds_llmpq.wording import format_number


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


def test_the_phase_that_is_named_is_the_one_that_took_the_time():
    # prefill is further off, but by milliseconds; a phase that was faster explains no slower run
    pairs = {
        "latency": {"predicted": 1.0, "measured": 1.5, "ratio": 1.5},
        "prefill": {"predicted": 0.01, "measured": 0.04, "ratio": 4.0},
        "decode": {"predicted": 0.9, "measured": 1.35, "ratio": 1.5},
    }
    assert "(decode 1.50 times)" in judge_times(pairs)
    pairs["decode"] = {"predicted": 0.9, "measured": 0.8, "ratio": 0.89}
    pairs["prefill"] = {"predicted": 0.04, "measured": 0.01, "ratio": 0.25}
    assert "(0.63 s more between passes): the plan's times are off" in judge_times(pairs), "what took it was no phase"
    pairs["latency"] = {"predicted": 2.0, "measured": 1.0, "ratio": 0.5}
    assert "(0.87 s less between passes)" in judge_times(pairs)


def test_the_report_gives_one_verdict_and_names_estimates(tmp_path):
    write_run(tmp_path)
    text = write_run_report(tmp_path, tmp_path / "page")
    assert text.count("verdict: ") == 1
    for name in ESTIMATES:
        assert f"{name} (an estimate, no plan)" in text


def test_a_run_of_milliseconds_is_not_judged(tmp_path):
    write_run(tmp_path)
    metrics = read(tmp_path)
    pair = {"predicted": 0.002, "measured": 0.014, "ratio": 7.0}
    metrics["predicted_against_measured"]["latency_seconds"] = pair
    assert "verdict: 0.014 s are too short a run to judge the plan's times by" in format_run(metrics)
    pair["measured"] = 0.5
    assert "verdict: the run took 7.00 times" in format_run(metrics)


def test_what_a_run_is_predicted_to_reach_is_said_where_it_is_less(tmp_path):
    plan = write_planned(tmp_path)
    total = plan.predicted.latency_seconds
    for share, said in ((0.0, False), (0.001, False), (1.0, True)):
        run = replace(plan, run_seconds=(1 + share) * total)
        speed = format_number(plan.predicted.throughput_tokens_per_second / 2, 4)
        for text in (format_plan(run), describe_plan(run)):
            assert ("as a run" in text) == said
            assert (f"; {speed} as a run, in which a stage's first pass of each size takes longer" in text) == said
    assert "as a run" not in describe_plan(replace(plan, run_seconds=None))


def test_the_page_has_the_predicted_rate_beside_the_measured_one(tmp_path):
    write_run(tmp_path)
    metrics = read(tmp_path)
    metrics["predicted_against_measured"]["latency_seconds"] = {"predicted": 0.5, "measured": 1.0, "ratio": 2.0}
    metrics["measured"]["generated_tokens"] = 617
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_run_report(tmp_path, tmp_path / "page")
    cells = r'throughput, tokens/s</td><td class="number">[^<]+</td><td class="number">1,234</td>'
    assert re.search(cells, (tmp_path / "page" / "report.html").read_text())


def test_prices_become_the_cost_of_a_million_tokens(tmp_path):
    write_run(tmp_path)
    plan = read_plan(tmp_path / "plan.json")
    assert plan.compute_cost(3600.0, 1, 1) is None
    stages = tuple(replace(stage, host="a", kind="cpu", slot=j) for j, stage in enumerate(plan.stages))
    plan = replace(plan, stages=stages, deployment=Deployment("float32", price_per_hour=3.0))
    cost = plan.compute_cost(1800.0, prompt_tokens=2_000_000, generated_tokens=1_000_000)
    assert cost == {"price_per_hour": 3.0, "total": 1.5, "per_million_generated_tokens": 1.5, "per_million_tokens": 0.5}
    said = "1.5 in all at 3 per hour; per million tokens: 1.5 (only generated ones), 0.5 (with prompts)"
    metrics = read(tmp_path) | {"cost": cost}
    assert f"cost while serving: {said}" in format_run(metrics)
    for text in (format_plan(plan), describe_plan(plan)):
        assert re.search(r"^cost: \S+ in all at 3 per hour; per million tokens: \S+ \(only", text, re.MULTILINE)
    write_plan(tmp_path / "plan.json", plan)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert said in write_run_report(tmp_path, tmp_path / "page")
    assert said in (tmp_path / "page" / "report.html").read_text()


def test_passes_are_held_against_their_own_sizes_and_answers_against_what_was_expected(tmp_path):
    times = PassTimes((1, 4), (0, 8), ((0.01, 0.09), (0.04, 0.36)))
    plan = write_planned(tmp_path)
    plan = replace(plan, stages=tuple(replace(stage, prefill_times=times) for stage in plan.stages))
    lengths, limits = SequenceLengths(), MicroBatchLimits(1, 8, 4)
    for index, prompt in enumerate((2, 4, 8, 8)):
        lengths.admit(prompt, 0, prompt + 9)
        lengths.end(index, 2)
    memory = {"weights": 1, "kv": 1, "peak_growth": 1}
    report = {"seconds": {"prefill": 0.4, "decode": 0.1, "sample": 0.05}, "passes": {"prefill": 4, "decode": 1}}
    report |= {"load_seconds": 1.0, "passes_ahead": 0, "tokens": {}, "memory_bytes": memory, "memory_warnings": []}
    report |= {"processors": use("a", 1.0, 1.5)}
    metrics = summarize(
        plan,
        {"total": 4, "completed": 4, "failed": 0},
        [StreamTimes(4, 1.0, 0.1, lengths)],
        [report | {"stage": index, "rank": index} for index in range(len(plan.stages))],
        startup_seconds=0.0,
        simulated=simulate_streams(plan, [(4, lengths, (), ())], limits),
        expected=expect(plan, [(4, [(2, 6)] * 4, (), ())], limits),
    )
    for stage, entry in zip(plan.stages, metrics["stages"], strict=True):
        prefill = entry["pass_seconds"]["prefill"]
        assert prefill["planned"] == stage.prefill_seconds
        assert prefill["predicted"] == pytest.approx((0.03 + 0.05 + 0.09 + 0.09) / 4)
        assert prefill["measured"] == pytest.approx((0.4 + 0.04) / 4)  # four of five passes sampled in prefill
    assert metrics["predicted_against_measured"]["prefill_seconds"]["measured"] == pytest.approx(0.44)
    assert "s for 24 tokens" in format_run(metrics)
    metrics["predicted_against_measured"]["expected_before"]["generated_tokens"] = 8
    assert "expected before" not in format_run(metrics)


def use(host, own, busy, seconds=1.0):
    """Of two processors."""
    return {"host": host, "processors": 2, "seconds": seconds, "own_seconds": own, "busy_seconds": busy}


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([use("a", 0.7, 1.9), use("a", 0.6, 1.8)], "30 % of the processors of a"),
        ([use("a", 1.0, 1.9), use("a", 0.9, 1.9)], None),  # all of it was ours
        ([use("a", 0.6, 1.2)], None),  # enough was idle
        ([use("a", 1.9, 1.9), use("b", 1.2, 2.0)], "40 % of the processors of b"),
        ([use("a", 1.0, 0.9)], None),  # the system counts in hundredths of a second
        ([use("a", 0.0, 0.0, seconds=0.0)], None),
    ],
)
def test_the_verdict_says_whether_others_had_the_processors(tmp_path, ranks, said):
    write_run(tmp_path)
    metrics = read(tmp_path) | {"hosts": share_processors(ranks)}
    [line] = [line for line in format_run(metrics).splitlines() if line.startswith("verdict")]
    assert said is None or line.endswith(f"; other programs had {said} meanwhile, measured")
    assert said or "other programs" not in line


def test_a_programs_work_is_not_that_of_others():
    measured = ProcessorUse()
    while time.process_time() - measured.own_before < 0.2:
        pass
    found = measured.measure()
    assert found["own_seconds"] >= 0.2
    assert found["own_seconds"] - 0.05 <= found["busy_seconds"] <= found["processors"] * found["seconds"] + 0.05
