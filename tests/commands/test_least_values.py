"""Counts of a configuration that are too small are refused in one sentence, before anything is read or started."""

import pytest

MODEL = "model=tiny"


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("sensitivity", ["calibration.rows=0", "calibration.tokens=-1", "calibration.rows_at_once=0"]),
        ("sensitivity", ["calibration.state_bytes=-1", "calibration.hessian_rows=0"]),
        ("evaluate", ["evaluation.limit_tokens=0", "evaluation.row_tokens=0", "evaluation.reference_bytes=-1"]),
        ("plan", ["planner.max_quality_loss=-1", "planner.theta=nan", "quant.group_size=0"]),
        ("evaluate", ["evaluation.fewshot=-1", "evaluation.limit_documents=0"]),
        (
            "profile",
            ["profiling.rounds=0", "profiling.chained_layers=0", "profiling.seconds=-1", "profiling.seconds=nan"],
        ),
    ],
)
def test_each_is_named_with_its_bound(call, tmp_path, command, keys):
    cluster = [] if command == "sensitivity" else ["cluster=demo_cpu2"]
    for key in keys:
        name, _, value = key.partition("=")
        code, _, err = call(command, MODEL, *cluster, key, f"out={tmp_path / name}")
        assert code == 1
        assert f"error: {name} is {value}" in err
        assert "but must be at least" in err
        assert "Traceback" not in err
