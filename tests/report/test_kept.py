"""When a sweep keeps a point, and when it does it again."""

import json

from ds_llmpq.report import sweep_cache


def test_a_point_is_kept_only_with_its_artefact_and_its_own_configuration(tmp_path):
    settings = {"out": "a", "planner": {"theta": 1.0}, "quant": {"bits": [4, 8]}}
    made = sweep_cache.digest("plan", settings)
    assert not sweep_cache.is_done(tmp_path, "plan", made)
    sweep_cache.note_done(tmp_path, "plan", made)
    assert not list(tmp_path.iterdir()), "without an artefact nothing is noted"
    (tmp_path / "plan.json").write_text("{}")
    assert not sweep_cache.is_done(tmp_path, "plan", made), "somebody else's plan"
    sweep_cache.note_done(tmp_path, "plan", made)
    assert sweep_cache.is_done(tmp_path, "plan", made)
    assert sweep_cache.digest("plan", {**settings, "out": "b"}) == made
    for other in ({**settings, "planner": {"theta": 2.0}}, {**settings, "quant": {"bits": [8, 4]}}):
        assert not sweep_cache.is_done(tmp_path, "plan", sweep_cache.digest("plan", other))
    assert sweep_cache.digest("evaluate", settings) != made
    sweep_cache.forget(tmp_path)
    assert not sweep_cache.is_done(tmp_path, "plan", made)


def test_a_changed_file_is_another_configuration(tmp_path):
    file = tmp_path / "sensitivity.json"
    file.write_text("{}")
    settings = {"planner": {"sensitivity": str(file)}, "missing": str(tmp_path / "none")}
    before = sweep_cache.digest("plan", settings)
    assert sweep_cache.digest("plan", settings) == before
    file.write_text(json.dumps({"more": 1}))
    assert sweep_cache.digest("plan", settings) != before


def test_a_damaged_note_is_no_note(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    for text in ("{", "[]", "{}", '{"digest": 3}'):
        (tmp_path / "point.json").write_text(text)
        assert not sweep_cache.is_done(tmp_path, "run", "x")
