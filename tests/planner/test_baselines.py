"""Baselines against brute force of their own objectives, and as plans that can be asked for."""

import itertools
import math
from dataclasses import replace

import pytest
from random_problems import random_problem

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import ESTIMATES
from ds_llmpq.planner import Problem, evaluate, solve, violations
from ds_llmpq.planner.adabits import adabits
from ds_llmpq.planner.arrays import pair_arrays
from ds_llmpq.planner.baselines import RULES, all_baselines, find_baseline
from ds_llmpq.planner.feasibility import pairs
from ds_llmpq.planner.llmpq_heuristic import llmpq_heuristic
from ds_llmpq.planner.objective import objective_value, rounds
from ds_llmpq.planner.pipeedge import pipeedge
from ds_llmpq.planner.problem import Objective


def problems(seeds, **options):
    """Random problems whose baselines' limits do not matter."""
    for seed in seeds:
        yield replace(Problem.from_json(random_problem(seed, **options)), objective=Objective("theta", theta=0.1))


def stage_losses(problem, arrays, d, first, last):
    """Losses of all bit choices of a stage that fit; written out again, from the contract alone."""
    room = arrays.capacity[d] - (arrays.embed_bytes if first == 0 else 0)
    if last == problem.layers and not (problem.memory.tied_head and first == 0):
        room -= arrays.head_bytes
    runs = (first > 0 or math.isfinite(arrays.embed[:, d].sum())) and (
        last < problem.layers or math.isfinite(arrays.head[:, d].sum())
    )
    usable = [b for b in range(len(problem.bits)) if arrays.available[d, b]] if runs else []
    for chosen in itertools.product(usable, repeat=last - first):
        layers = range(first, last)
        if sum(arrays.layer_bytes[i, b] for i, b in zip(layers, chosen, strict=True)) <= room:
            yield sum(problem.sensitivity[i][b] for i, b in zip(layers, chosen, strict=True))


def cuts(problem):
    """(devices, edges) of all subsets in listed order and all cuts."""
    for count in range(1, min(len(problem.devices), problem.layers) + 1):
        for chosen in itertools.combinations(range(len(problem.devices)), count):
            for inner in itertools.combinations(range(1, problem.layers), count - 1):
                yield chosen, (0, *inner, problem.layers)


def test_adabits_loses_no_more_than_any_plan_in_its_order():
    compared = 0
    for problem in problems(range(4000, 4120)):
        found = {(a.prefill_micro_batch, a.decode_micro_batch): a for a in adabits(problem)}
        for pair in pairs(problem):
            arrays, least = pair_arrays(problem, *pair), math.inf
            for chosen, edges in cuts(problem):
                stages = [
                    min(stage_losses(problem, arrays, d, *span), default=math.inf)
                    for d, span in zip(chosen, itertools.pairwise(edges), strict=True)
                ]
                least = min(least, sum(stages))
            if pair not in found:
                assert least == math.inf
                continue
            assert violations(problem, found[pair]) == []
            assert evaluate(problem, found[pair]).quality_loss == pytest.approx(least, rel=1e-9, abs=1e-12)
            compared += 1
    assert compared > 100


def slowest_work(problem, assignment):
    """Seconds of the slowest stage or link on the whole batch; the way back of tokens is not PipeEdge's."""
    seen = evaluate(problem, assignment)
    m_p, m_d = rounds(problem, assignment.prefill_micro_batch, assignment.decode_micro_batch)
    steps = m_d * (problem.workload.generated_tokens - 1)
    stages = zip(seen.stage_prefill_seconds, seen.stage_decode_seconds, strict=True)
    links = zip(seen.link_prefill_seconds[:-1], seen.link_decode_seconds[:-1], strict=True)
    return max(m_p * p + steps * d for p, d in (*stages, *links))


def test_pipeedge_has_the_fastest_slowest_resource():
    compared = 0
    for problem in problems(range(5000, 5060)):
        for made in pipeedge(problem):
            bits, least = made.stages[0].bits[0], math.inf
            for count in range(1, min(len(problem.devices), problem.layers) + 1):
                for chosen in itertools.permutations(range(len(problem.devices)), count):
                    if problem.device_order == "fixed" and list(chosen) != sorted(chosen):
                        continue
                    for inner in itertools.combinations(range(1, problem.layers), count - 1):
                        spans = zip(chosen, itertools.pairwise((0, *inner, problem.layers)), strict=True)
                        stages = tuple(
                            replace(
                                made.stages[0], device=problem.devices[d].name, first=a, last=b, bits=(bits,) * (b - a)
                            )
                            for d, (a, b) in spans
                        )
                        other = replace(made, stages=stages)
                        if not violations(problem, other):
                            least = min(least, slowest_work(problem, other))
            assert slowest_work(problem, made) == pytest.approx(least, rel=1e-5)
            compared += 1
    assert compared > 50


def test_the_heuristic_improves_on_adabits_and_breaks_no_rule():
    better = 0
    for problem in problems(range(6000, 6030), layers=10, devices=3, types=2, mode="theta"):
        starts = list(adabits(problem))
        for made in llmpq_heuristic(problem):
            assert violations(problem, made) == []
        if starts:
            fastest = min(starts, key=lambda a: evaluate(problem, a).latency_seconds)
            value = objective_value(problem, evaluate(problem, fastest))
            reached = objective_value(problem, evaluate(problem, next(iter(llmpq_heuristic(problem)))))
            assert reached <= value
            better += reached < value
    assert better > 5


@pytest.mark.parametrize("name", RULES)
def test_a_baseline_is_a_plan_within_the_memory(name):
    plans = 0
    for problem in problems(range(30), mode="theta"):
        try:
            plan = solve(problem, baseline=name)
        except InfeasibleError:
            continue
        assert violations(problem, plan.assignment()) == []
        assert (plan.solver.name, plan.solver.status, plan.solver.bound) == (name, "baseline", None)
        assert plan.predicted == find_baseline(problem, name).outcome
        plans += 1
    assert plans > 5


@pytest.mark.parametrize("name", ESTIMATES)
def test_flexgen_is_an_estimate_and_says_so(name):
    refused = 0
    for seed in range(40):
        problem = next(problems([seed], layers=4, devices=2, widths=3))
        found = find_baseline(problem, name)
        assert found.assignment is None
        if isinstance(found.outcome, str):
            with pytest.raises(InfeasibleError, match=rf"^planner.baseline={name} has no plan"):
                solve(problem, baseline=name)
            continue
        with pytest.raises(UserError, match=r"is an estimate of weight offloading .*, which this engine cannot run"):
            solve(problem, baseline=name)
        refused += 1
    assert refused > 5


def test_flexgen_streams_what_does_not_fit():
    """One device with half of what the weights need: a pass takes at least as long as the other half's copy."""
    obj = random_problem(5, layers=4, devices=1, widths=1, types=1, mode="theta")
    obj["bits"], kind = [16], next(iter(obj["device_types"].values()))
    old = next(iter(kind["prefill_layer_seconds"]))
    kind["bits"] = [16]
    for phase in ("prefill", "decode"):
        kind[f"{phase}_layer_seconds"] = {"16": dict.fromkeys(kind[f"{phase}_layer_seconds"][old], 1e-6)}
        for part in ("embed", "head"):
            kind[f"{phase}_{part}_seconds"] = dict.fromkeys(kind[f"{phase}_{part}_seconds"], 0.0)
    memory = obj["memory"] | {"layer_bytes": {"16": 6e9}, "kv_bytes_per_sequence_layer": 0, "embed_bytes": 0}
    obj["memory"] = memory | {"head_bytes": 0}
    for sizes in memory["workspace_bytes"].values():
        sizes.update(dict.fromkeys(sizes, 0))
    obj["sensitivity"] = [[0.0]] * 4
    obj["devices"][0]["memory_bytes"] = 12_000_000_000
    obj["workload"]["generated_tokens"] = 5
    found = find_baseline(Problem.from_json(obj), "flexgen").outcome
    assert found.latency_seconds == pytest.approx(5 * 12e9 / 12e9, rel=1e-3)


def test_bad_names_and_pins_are_one_sentence():
    obj = random_problem(1, layers=4, devices=2, mode="theta")
    with pytest.raises(UserError, match=r"planner.baseline is 'best', but must be null or one of uniform, "):
        solve(obj, baseline="best")
    with pytest.raises(UserError, match="knows no pins"):
        solve(obj, baseline="uniform", pins={"micro_batch": {"decode": obj["micro_batches"]["decode"][0]}})


def test_every_plan_is_compared_with_all_but_the_slowest():
    problem = next(problems([1], layers=4, devices=2))
    assert set(all_baselines(problem)) == {*RULES, *ESTIMATES} - {"llmpq_heuristic"}
