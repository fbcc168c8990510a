"""Scripts that measure on the pipeline, without the pipeline: what they ask for, and how they sum up."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import length_runs
import order
import replay
import theta_sweep

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.plan import read_plan


def test_requests_are_valid_and_of_the_lengths_asked_for(tmp_path):
    drawn = length_runs.scaled_answers(800, 3, 30.0, 300)
    tokens = [each.output_tokens for each in drawn]
    assert 1 <= min(tokens) <= max(tokens) <= 300
    assert sum(tokens) / len(tokens) == pytest.approx(30, rel=0.2)
    rows = [
        length_runs.request(str(n), each.text, each.output_tokens, ignore_eos=True, arrival_seconds=0.5 * n)
        for n, each in enumerate(drawn[:20])
    ]
    chats = order.chat_rows(20, 64)
    requests = list(
        read_requests(str(length_runs.write_lines(tmp_path / "a", [*rows, *chats])), BatchConfig()).requests
    )
    assert len(requests) == 40
    assert [each.arrival_seconds for each in requests[:20]] == [0.5 * n for n in range(20)]
    assert [each.params.max_tokens for each in requests] == [*tokens[:20], *[64] * 20]
    assert order.chat_rows(20, 64) == chats


def test_policies_are_compared_within_a_seed():
    def run(seed, policy, mean, longest):
        jct = {"mean": mean, "p50": mean / 2, "p99": 3 * mean}
        return {
            "seed": seed, "load": 0.9, "policy": policy, "jct_seconds": jct,
            "waiting_seconds": {"mean": mean / 3, "max": longest},
        }  # fmt: skip

    options = SimpleNamespace(loads=[0.9], policies=["fcfs", "sjf"], requests=9, slots=2, mean_tokens=30.0)
    runs = [run(0, "fcfs", 4.0, 8.0), run(0, "sjf", 2.0, 9.0), run(1, "fcfs", 10.0, 7.0), run(1, "sjf", 9.0, 6.0)]
    text = replay.summary(options, runs)
    fcfs, sjf = (" ".join(line.split()) for line in text.splitlines()[-2:])
    assert fcfs == "0.9 fcfs 2 7.00 s 3.50 s 21.00 s 2.33 s 8.00 s +0 % (+0 to +0)"
    assert sjf == "0.9 sjf 2 5.50 s 2.75 s 16.50 s 1.83 s 9.00 s -30 % (-50 to -10)"


def test_thetas_of_one_plan_share_its_runs(tmp_path):
    plans = theta_sweep.distinct_plans([1e-3, 2e-3, 1e4], list(theta_sweep.DEFAULTS), tmp_path)
    assert [row["thetas"] for row in plans] == [[1e-3, 2e-3], [1e4]]
    fast, exact = (row["plan"].predicted for row in plans)
    assert fast.latency_seconds < exact.latency_seconds
    assert fast.quality_loss > exact.quality_loss
    assert read_plan(plans[0]["file"]).to_json() == plans[0]["plan"].to_json()
    prompts = read_requests(str(theta_sweep.written_prompts(tmp_path, plans[0])), BatchConfig())
    workload = plans[0]["plan"].workload
    assert prompts.total == 4 * workload.sequences
    assert {(len(each.prompt), each.params.max_tokens) for each in prompts.requests} == {
        (workload.prompt_tokens, workload.generated_tokens)
    }
    for speed, row in enumerate(plans):
        folder = row["file"].parent
        for name in ("run0", "run1", "quality"):
            (folder / name).mkdir()
        for repeat, more in ((0, 0.0), (1, 8.0)):
            metrics = {"measured": {"throughput_tokens_per_second": 100.0 * (2 - speed) + more}}
            (folder / f"run{repeat}" / "metrics.json").write_text(json.dumps(metrics))
        scores = {"loss_increase": {"measured": 0.03, "standard_error": 0.001}, "perplexity_per_token": 42.0}
        (folder / "quality" / "scores.json").write_text(json.dumps(scores))
    rows = [theta_sweep.measured(row, 2) for row in plans]
    assert [(row["theta"], row["tokens/s"], row["least"]) for row in rows] == [
        ("0.001 0.002", 204.0, 200.0), ("10000", 104.0, 100.0),
    ]  # fmt: skip
    theta_sweep.draw(rows, tmp_path / "theta.png")
    assert (tmp_path / "theta.png").stat().st_size > 1000
