"""`plan -m`: a point that is there is kept, a changed or failed one is done again; other launchers can be chosen."""

import json
import re

import pytest

BASE = ["+experiment=demo", "hydra/launcher=basic"]


@pytest.mark.slow
def test_points_are_kept_until_something_changes(call, tmp_path):
    again = ["plan", "-m", "planner.theta=1,100000", *BASE, f"out={tmp_path}"]
    code, text, _ = call(*again)
    assert code == 0
    assert "kept:" not in text
    before, _, table = text.partition("\npoint")
    assert len(re.findall(r"^\S+: plan: localhost", before, re.MULTILINE)) == 2
    assert "workload: " not in before
    assert len(table.splitlines()) < 15
    plans = sorted(tmp_path.glob("*/plan.json"))
    assert len(plans) == 2
    times = [plan.stat().st_mtime_ns for plan in plans]
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["overrides"]["planner.theta"] for row in rows] == ["1", "100000"]
    assert all(row["pipeedge"] > 0 for row in rows)

    code, text, _ = call(*again)
    assert (code, text.count("kept:")) == (0, 2)
    assert [plan.stat().st_mtime_ns for plan in plans] == times
    assert "predicted speed-up over pipeedge" in text, "the summary is made anew all the same"

    code, text, _ = call("plan", "-m", "planner.theta=1,10,100000", *BASE, f"out={tmp_path}")
    assert (code, text.count("kept:")) == (0, 2)
    plans[0].unlink()
    code, text, _ = call(*again)
    assert (code, text.count("kept:")) == (0, 1)
    assert plans[0].is_file()


def test_a_failed_point_is_tried_again_and_not_called_failed_for_ever(call, tmp_path):
    again = ["plan", "-m", "planner.theta=1,2", *BASE, f"out={tmp_path}"]
    assert call(*again, "workload.sequences=64")[0] == 2
    assert len(list(tmp_path.glob("*/failure.json"))) == 2
    code, text, _ = call(*again, "workload.sequences=64")
    assert (code, text.count("kept:")) == (2, 0)
