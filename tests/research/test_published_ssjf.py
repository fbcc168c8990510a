"""The published simulator's schedules, to 1e-6, on cases taken from a public trace, and its oddities one by one."""

import json
from pathlib import Path

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.research.published_ssjf import Case, CaseGuard, read_cases, schedules

CASES = Path(__file__).parent / "data" / "published_schedules.json"
ROWS = json.loads(CASES.read_text())


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_schedules_are_the_published_ones(number):
    expected = ROWS[number]["completion"]
    found = schedules(read_cases(CASES)[number])
    assert found.keys() == expected.keys()
    for policy, ends in expected.items():
        assert list(found[policy]) == list(ends)
        assert found[policy] == pytest.approx(ends, abs=1e-6, rel=0)


def test_every_mode_is_among_the_cases():
    assert {(row["mode"], row["max_batch"]) for row in ROWS} == {
        ("NO_BATCHING", 1),
        ("STATIC_BATCHING", 2),
        ("STATIC_BATCHING", 4),
        ("DYNAMIC_BATCHING", 2),
        ("DYNAMIC_BATCHING", 4),
    }


def test_the_last_job_is_lost_if_nothing_waits_before_it():
    found = schedules(Case("NO_BATCHING", [0.0, 100.0], [10, 10], [0, 0]))
    assert found == {"fcfs": {"0": 0.3, "1": 100.3}, "sjf": {"0": 0.3}, "ssjf": {"0": 0.3}}


def test_only_first_come_waits_for_a_partial_batch():
    found = schedules(Case("STATIC_BATCHING", [0.0, 1.0, 50.0], [100, 10, 10], [0, 0, 0], max_batch=4))
    assert found["fcfs"]["0"] == pytest.approx(12.1)
    assert found["sjf"]["0"] == pytest.approx(2.1)


def test_a_class_is_taken_for_tokens():
    # class 9 stands for 9 tokens, so the job of 400 tokens and class 0 goes first
    found = schedules(Case("NO_BATCHING", [0.0, 0.1, 0.2, 0.3], [50, 400, 10, 20], [0, 0, 9, 8]))
    assert list(found["ssjf"]) == ["0", "1", "3", "2"]
    assert list(found["sjf"]) == ["0", "2", "3", "1"]


def test_the_guard_orders_the_whole_queue_by_waiting():
    guard = CaseGuard(threshold=30.0)
    case = Case("NO_BATCHING", [0.0, 1.0, 2.0, 3.0], [2000, 100, 50, 10], [0, 0, 0, 0], starvation=guard)
    assert list(schedules(case)["sjf"]) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("{}", "holds no list"),
        ("[1]", "case 0"),
        ('[{"mode": "X", "arrival": [], "generated_tokens": [], "predicted_class": []}]', "NO_BATCHING"),
        ('[{"mode": "NO_BATCHING", "arrival": [1], "generated_tokens": [], "predicted_class": []}]', "one entry"),
        (
            '[{"mode": "NO_BATCHING", "max_batch": 0, "arrival": [], "generated_tokens": [], "predicted_class": []}]',
            "max_batch is 0",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, said):
    file = tmp_path / "cases.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_cases(file)
