"""The contract's formula by hand, and the checker against every way to break a plan."""

from dataclasses import replace

import pytest
from random_problems import random_problem

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner import Problem, evaluate, violations
from ds_llmpq.planner.objective import objective_value, tie_value


def by_hand() -> Problem:
    """Two layers, two devices, round numbers."""
    return Problem.from_json(
        {
            "schema": 1,
            "layers": 2,
            "bits": [4, 8],
            "workload": {"sequences": 6, "prompt_tokens": 10, "generated_tokens": 3},
            "micro_batches": {"prefill": [2], "decode": [4]},
            "device_types": {
                "t": {
                    "bits": [4, 8],
                    "prefill_layer_seconds": {"4": {"2": 1.0}, "8": {"2": 2.0}},
                    "decode_layer_seconds": {"4": {"4": 0.1}, "8": {"4": 0.3}},
                    "prefill_embed_seconds": {"2": 0.5},
                    "prefill_head_seconds": {"2": 0.25},
                    "decode_embed_seconds": {"4": 0.05},
                    "decode_head_seconds": {"4": 0.02},
                }
            },
            "devices": [{"name": name, "type": "t", "memory_bytes": 100} for name in ("a", "b")],
            "memory": {
                "layer_bytes": {"4": 10, "8": [20, 30]},
                "kv_bytes_per_sequence_layer": 1,
                "embed_bytes": 7,
                "head_bytes": 5,
                "tied_head": True,
                "workspace_bytes": {"prefill": {"2": 3}, "decode": {"4": 4}},
            },
            "links": {
                "default": {"latency_seconds": 0.01, "seconds_per_byte": 0.001},
                "pairs": [{"from": "b", "to": "a", "latency_seconds": 0.0, "seconds_per_byte": 0.01}],
                "hidden_bytes_per_token": 2,
                "token_bytes": 8,
            },
            "sensitivity": [[1.0, 0.5], [2.0, 0.25]],
            "objective": {"mode": "theta", "theta": 10.0},
        }
    )


def two_stages() -> Assignment:
    return Assignment((StageAssignment("a", 0, 1, (4,)), StageAssignment("b", 1, 2, (8,))), 2, 4)


def test_two_stages_by_hand():
    seen = evaluate(by_hand(), two_stages())
    # P = 1 + 0.5, 2 + 0.25; p = 0.01 + 2 * 10 * 2 * 0.001, 2 * 8 * 0.01; m_p = 3
    assert seen.stage_prefill_seconds == pytest.approx((1.5, 2.25))
    assert seen.link_prefill_seconds == pytest.approx((0.05, 0.16))
    assert seen.prefill_seconds == pytest.approx(1.5 + 2.25 + 0.05 + 0.16 + 2 * 2.25)
    # D = 0.1 + 0.05, 0.3 + 0.02; d = 0.01 + 4 * 2 * 0.001, 4 * 8 * 0.01; m_d = 2, two rounds
    assert seen.link_decode_seconds == pytest.approx((0.018, 0.32))
    assert seen.decode_seconds == pytest.approx(2 * max(2 * 0.32, 0.15 + 0.32 + 0.018 + 0.32))
    assert seen.quality_loss == pytest.approx(1.25)
    assert seen.throughput_tokens_per_second == pytest.approx(18 / seen.latency_seconds)
    assert seen.stage_memory_bytes[0] == {"weights": 10, "kv": 6, "embed": 7, "head": 0, "workspace": 4}
    assert seen.stage_memory_bytes[1] == {"weights": 30, "kv": 6, "embed": 0, "head": 5, "workspace": 4}
    assert objective_value(by_hand(), seen) == pytest.approx(seen.latency_seconds + 12.5)
    assert tie_value(by_hand(), seen) == seen.latency_seconds


def test_single_stage_has_no_link_and_shares_the_tied_head():
    seen = evaluate(by_hand(), Assignment((StageAssignment("a", 0, 2, (4, 4)),), 2, 4))
    assert seen.link_prefill_seconds == (0.0,)
    assert seen.stage_memory_bytes[0]["head"] == 0
    assert seen.decode_seconds == pytest.approx(2 * 2 * (0.1 + 0.1 + 0.05 + 0.02))


def test_the_norm_before_a_tied_head_is_its_own():
    made = by_hand()
    made = replace(made, memory=replace(made.memory, tied_bytes=4))
    alone = evaluate(made, Assignment((StageAssignment("a", 0, 2, (4, 4)),), 2, 4))
    assert alone.stage_memory_bytes[0]["head"] == 5 - 4
    assert evaluate(made, two_stages()).stage_memory_bytes[1]["head"] == 5


BROKEN = [
    (Assignment((StageAssignment("a", 0, 1, (4,)),), 2, 4), "end at layer 1"),
    (Assignment((StageAssignment("a", 0, 1, (4,)), StageAssignment("a", 1, 2, (4,))), 2, 4), "already uses"),
    (Assignment((StageAssignment("a", 0, 2, (4, 4)), StageAssignment("b", 2, 2, ())), 2, 4), "not be empty"),
    (Assignment((StageAssignment("a", 1, 2, (4,)), StageAssignment("b", 0, 1, (4,))), 2, 4), "must begin at 0"),
    (Assignment((StageAssignment("c", 0, 2, (4, 4)),), 2, 4), "no device"),
    (Assignment((StageAssignment("a", 0, 2, (4, 5)),), 2, 4), "bit widths"),
    (Assignment((StageAssignment("a", 0, 2, (4,)),), 2, 4), "for each of its layers"),
    (Assignment((StageAssignment("a", 0, 2, (4, 4)),), 3, 4), "prefill micro-batch is 3"),
]


@pytest.mark.parametrize(("assignment", "sentence"), BROKEN, ids=[b[1] for b in BROKEN])
def test_checker_names_what_is_broken(assignment, sentence):
    assert any(sentence in text for text in violations(by_hand(), assignment))


def test_checker_sees_memory_limits_and_order():
    problem = by_hand()
    assert violations(problem, two_stages()) == []
    small = replace(problem, devices=tuple(replace(d, memory_bytes=44) for d in problem.devices))
    assert ["bytes" in text for text in violations(small, two_stages())] == [True]
    exact = replace(problem, devices=tuple(replace(d, memory_bytes=45) for d in problem.devices))
    assert violations(exact, two_stages()) == []
    turned = Assignment((StageAssignment("b", 0, 1, (4,)), StageAssignment("a", 1, 2, (8,))), 2, 4)
    assert violations(replace(problem, device_order="fixed"), turned) == [
        "The stages do not follow the fixed device order."
    ]


def test_checker_sees_missing_times():
    obj = by_hand().to_json()
    obj["device_types"]["t"]["decode_layer_seconds"]["8"] = {"4": None}
    assert "does not offer" in violations(Problem.from_json(obj), two_stages())[0]


@pytest.mark.parametrize("seed", range(10))
def test_uneven_sequences_round_micro_batches_up(seed):
    obj = random_problem(seed, mode="theta")
    obj["workload"]["sequences"] = 5
    problem = Problem.from_json(obj)
    from ds_llmpq.planner.objective import rounds

    assert rounds(problem, 2, 4) == (3, 2)
