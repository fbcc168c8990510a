"""Which points are timed."""

from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.profiling.points import plan_points

SIZES = {"prefill": [1, 4], "decode": [2, 8]}


def test_the_workloads_own_points_come_first():
    groups = plan_points("core", [4, 16], SIZES, WorkloadConfig(8, 100, 40))
    first = {(p.part, p.phase, p.bits, p.batch, p.length_tokens) for p in groups[0]}
    for bits in (4, 16):
        assert {("layer", "prefill", bits, size, 100) for size in (1, 4)} <= first
        assert {("layer", "decode", bits, size, 120) for size in (2, 8)} <= first
    assert {("embed", "prefill", 0, 4, 100), ("embed", "decode", 0, 8, 1), ("head", "decode", 0, 1, 1)} <= first
    every = [point for group in groups for point in group]
    assert len(every) == len(set(every))
    assert {p.length_tokens for p in every if p.part == "layer" and p.phase == "prefill"} == {100, 25, 6}
    assert {p.length_tokens for p in every if p.part == "layer" and p.phase == "decode"} == {120, 25, 138, 100}


def test_lengths_stay_positive_and_within_the_cache():
    for generated in (1, 2, 3):
        for point in (p for g in plan_points("core", [16], SIZES, WorkloadConfig(8, 1, generated)) for p in g):
            assert point.length_tokens >= 1
            if point.phase == "decode" and point.part == "layer":
                assert point.length_tokens < 1 + generated or generated == 1
