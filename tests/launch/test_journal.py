"""What a folder's results were made from: kept whole, compared in words, locked against a second run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.errors import UserError
from ds_llmpq.launch.journal import (
    FINISHED,
    JOURNAL_NAME,
    Identity,
    Journal,
    fingerprint_plan,
    flatten,
    lock_folder,
    make_paths_absolute,
    select_sampling,
)
from ds_llmpq.plan.planfile import read_plan

FORMER_FINGERPRINT = "f15d8402c1a0612865029a697291500d4b16d8b8b6bae422625604207b422ec8"  # as that version had it
IDENTITY = Identity(
    "a" * 64, "b" * 64, "c" * 64, {"temperature": 0.0, "seed": 0}, {"quant.bits": (4, 8), "model": "x"}, "e" * 64
)


def test_the_same_files_are_the_same_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    settings = {"model.path": "model é", "quantized": None, "quant.bits": [4, 8]}
    monkeypatch.chdir(tmp_path)
    Journal(replace(IDENTITY, settings=settings)).write(tmp_path)  # as an earlier version kept it
    kept = Journal.read(tmp_path)
    for folder, path in ((tmp_path, tmp_path / "model é"), (tmp_path / "elsewhere", "../model é")):
        monkeypatch.chdir(folder)
        kept.check(replace(IDENTITY, settings=make_paths_absolute(settings | {"model.path": str(path)})), tmp_path)
    with pytest.raises(UserError, match=r"model é.*other é"):
        kept.check(replace(IDENTITY, settings=make_paths_absolute(settings | {"model.path": "other é"})), tmp_path)


def test_it_reads_back(tmp_path):
    assert Journal.read(tmp_path) is None
    journal = Journal(IDENTITY).begin_attempt().end_attempt("the pipeline was ended by signal 9", 7).begin_attempt()
    journal.write(tmp_path)
    back = Journal.read(tmp_path)
    assert back.attempts == journal.attempts
    assert [attempt.results for attempt in back.attempts] == [7, 0]
    back.check(IDENTITY, tmp_path)  # what was a tuple is a list now, and still the same
    done = back.end_attempt("finished", 9, {"total": 9, "completed": 9, "failed": 0})
    done.write(tmp_path)
    assert Journal.read(tmp_path).state == FINISHED
    assert Journal.read(tmp_path).counts["completed"] == 9


def test_a_run_begun_under_former_names_goes_on(tmp_path):
    former = {"quant.head_bits": 8, "quant.whole_rows": [8]}
    Journal(replace(IDENTITY, settings=former)).write(tmp_path)
    present = {"quant.lm_head_bits": 8, "quant.per_channel_bits": [8]}
    Journal.read(tmp_path).check(replace(IDENTITY, settings=present), tmp_path)
    with pytest.raises(UserError, match=r"quant.lm_head_bits \(8, now 4\)"):
        Journal.read(tmp_path).check(replace(IDENTITY, settings=present | {"quant.lm_head_bits": 4}), tmp_path)
    made = {"quant.bits": [4, 16], "model.path": "/m"}
    now = made | {"quant.kv_bits": 16, "quant.zeros": "auto", "workload.drawn_share": None}
    now["workload.pool_positions"] = None
    Journal(replace(IDENTITY, settings=made)).write(tmp_path)
    Journal.read(tmp_path).check(replace(IDENTITY, settings=now), tmp_path)
    with pytest.raises(UserError, match=r"quant.kv_bits \(16, now 8\)"):
        Journal.read(tmp_path).check(replace(IDENTITY, settings=now | {"quant.kv_bits": 8}), tmp_path)
    plan = read_plan(Path(__file__).parents[1] / "plan/assets/deployed.schema1.json")
    assert fingerprint_plan(plan) == FORMER_FINGERPRINT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": "d" * 64}, "the input"),
        ({"model": "d" * 64}, "the model"),
        ({"plan": "d" * 64}, "the plan"),
        ({"texts": "d" * 64}, "tokenizer, chat template or generation_config.json"),
        ({"sampling": {"temperature": 0.5, "seed": 0}}, r"batch.temperature \(0.0, now 0.5\)"),
        ({"settings": {"quant.bits": [4], "model": "x"}}, r"quant.bits \(\[4, 8\], now \[4\]\)"),
        ({"settings": {"quant.bits": [4, 8]}}, r'model \("x", now null\)'),
    ],
)
def test_what_changed_is_named_and_the_rest_is_not(tmp_path, change, said):
    journal = Journal(IDENTITY)
    journal.write(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        Journal.read(tmp_path).check(replace(IDENTITY, **change), tmp_path)
    assert str(refused.value).count("now") == (0 if "texts" in change else 1)


def test_what_is_not_known_yet_is_let_pass(tmp_path):
    Journal(IDENTITY).check(replace(IDENTITY, plan=None, model=None, settings={}), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}', "[" * 100_000])
def test_a_damaged_journal_is_one_sentence(tmp_path, text):
    (tmp_path / JOURNAL_NAME).write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        Journal.read(tmp_path)


def test_order_and_predictor_change_no_result():
    assert select_sampling(BatchConfig()) == select_sampling(BatchConfig(order="bucketed", predictor="p"))
    assert select_sampling(BatchConfig()) != select_sampling(BatchConfig(seed=1))


def test_settings_are_named_by_dotted_keys():
    assert flatten("", {"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_a_second_run_is_kept_out(tmp_path):
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass


def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    Journal(IDENTITY).write(tmp_path)
    before = (tmp_path / JOURNAL_NAME).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        Journal(IDENTITY).begin_attempt().write(tmp_path)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    assert json.loads(before)["schema"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [JOURNAL_NAME]


def test_the_time_that_templates_are_told_is_kept(tmp_path):
    journal = Journal(IDENTITY, template_time="2026-07-14T10:20:30").begin_attempt()
    journal.write(tmp_path)
    assert Journal.read(tmp_path).begin_attempt().template_time == "2026-07-14T10:20:30"
    fields = json.loads((tmp_path / JOURNAL_NAME).read_text())
    (tmp_path / JOURNAL_NAME).write_text(json.dumps(fields | {"template_time": "noon"}))
    with pytest.raises(UserError, match=r"run\.json"):
        Journal.read(tmp_path)
    del fields["template_time"]  # of an earlier version
    (tmp_path / JOURNAL_NAME).write_text(json.dumps(fields))
    assert Journal.read(tmp_path).template_time
