"""Lengths at work under the real launcher: a replayed trace, and reserves that are too short."""

import json

import pytest
from launching import PRECISE, completion, run, write_cluster, write_rows

from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.lengths.dataset import split
from ds_llmpq.lengths.predictor import train
from ds_llmpq.lengths.records import Example
from scripts.make_length_data import make_answers

pytestmark = pytest.mark.launcher
TEXT = "The quick brown fox jumps over the lazy dog."
# (prompt's characters, arrival, answer's tokens); slots of 32 positions, of which the long answers need more
REQUESTS = [(12, 0.0, 40), (9, 0.0, 3), (20, 0.3, 5), (4, 0.3, 44), (16, 0.4, 2), (7, 1.5, 8)]
SMALL = ("workload.sequences=2", "workload.prompt_tokens=16", "workload.generated_tokens=16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rows = []
    for index, (characters, arrival, tokens) in enumerate(REQUESTS):
        row = completion(f"row-{index}", TEXT[:characters], tokens) | {"arrival_seconds": arrival}
        row["body"]["ignore_eos"] = True
        rows.append(row)
    return write_rows(tmp_path_factory.mktemp("input") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """Believes that answers have some three tokens."""
    config = LengthDataConfig()
    drawn = [
        Example(each.text, 1 + number % 5, "random", 9, str(number)) for number, each in enumerate(make_answers(300))
    ]
    folder = tmp_path_factory.mktemp("predictor")
    train(split(drawn, config), LengthTaskConfig(), ProxyConfig(features=512), config).save(folder)
    return folder


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, checkpoint, rows, predictor):
    folder = tmp_path_factory.mktemp("replayed")
    cluster = write_cluster(folder / "cluster.yaml", {"localhost": [6, 6]})
    ended = run(
        "run", f"model.path={checkpoint}", f"cluster_file={cluster}", f"input={rows}", f"out={folder / 'out'}",
        "batch.replay=trace", "batch.policy=ssjf", f"batch.predictor={predictor}", *PRECISE, *SMALL,
    )  # fmt: skip
    return folder / "out", ended


def answers_of(out):
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["custom_id"]: row["response"]["body"]["choices"] for row in found}


def test_a_replay_keeps_to_arrivals_and_reports_times(replayed):
    out, ended = replayed
    assert ended.returncode == 0, ended.stderr
    assert sorted(answers_of(out)) == [f"row-{index}" for index in range(len(REQUESTS))]
    report = json.loads((out / "metrics.json").read_text())["replay"]
    assert (report["policy"], report["jobs"], report["source"]) == ("ssjf", len(REQUESTS), "measured")
    assert report["makespan_seconds"] > max(arrival for _, arrival, _ in REQUESTS)
    assert 0 < report["jct_seconds"]["p50"] <= report["jct_seconds"]["p99"] <= report["makespan_seconds"]
    assert 0 <= report["waiting_seconds"]["mean"] <= report["waiting_seconds"]["max"]
    assert report["waiting_seconds"]["mean"] < report["jct_seconds"]["mean"]


def test_an_answer_that_outgrows_its_reserve_is_admitted_again(replayed, checkpoint, rows, predictor, tmp_path):
    ended = run(
        "run", f"plan={replayed[0] / 'plan.json'}", f"model.path={checkpoint}", f"input={rows}",
        f"out={tmp_path / 'out'}", "batch.admission=q90", f"batch.predictor={predictor}", *PRECISE,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    order = json.loads((tmp_path / "out" / "metrics.json").read_text())["order"]
    assert order["admission"] == "q90"
    assert order["requeued"] == sum(tokens >= 40 for _, _, tokens in REQUESTS)
    assert answers_of(tmp_path / "out") == answers_of(replayed[0])
