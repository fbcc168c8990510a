"""A baseline's plan runs like any other, and a sweep over baselines has what was measured beside what was predicted."""

import csv

import pytest
from launching import BUDGETS, PRECISE, WORKLOAD, read_rows, run, write_cluster

from ds_llmpq.plan import read_plan

pytestmark = pytest.mark.launcher


def test_a_sweep_over_baselines_measures_each(tmp_path, checkpoint, prompts):
    cluster = write_cluster(tmp_path / "cluster.yaml", {"localhost": [2 * budget for budget in BUDGETS]})
    ended = run(
        "run", "-m", "planner.baseline=null,pipeedge", f"model.path={checkpoint}", f"cluster_file={cluster}",
        f"input={prompts}", f"out={tmp_path / 'out'}", *PRECISE, *WORKLOAD, timeout=480.0,
    )  # fmt: skip
    rows = {row["planner.baseline"]: row for row in csv.DictReader((tmp_path / "out" / "summary.csv").open(newline=""))}
    assert rows.keys() == {"null", "pipeedge"}, ended.stderr
    for name, row in rows.items():
        folder = tmp_path / "out" / row["point"]
        plan = read_plan(folder / "plan.json")
        assert plan.is_deployed
        assert (plan.solver.status == "baseline") == (name == "pipeedge")
        assert all(stage.memory_bytes.total <= stage.memory_budget_bytes for stage in plan.stages)
        assert len(read_rows(folder / "results.jsonl")) == 10
        assert float(row["measured_throughput_tokens_per_second"]) > 0
    assert "speed-up over pipeedge: measured " in ended.stdout
