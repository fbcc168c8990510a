"""`solve` as a whole: baselines, pins, limits, interruption, progress, infeasible and degenerate problems."""

import copy
import re
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from random_problems import random_problem

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner import Pins, Problem, check_plan, evaluate, pareto, solve, violations
from ds_llmpq.planner.baselines import all_baselines
from ds_llmpq.planner.objective import find_time_error, objective_value
from ds_llmpq.planner.solve import _prefer_unquantized
from ds_llmpq.planner.unquantized import leave_unquantized
from ds_llmpq.report.plan_table import describe_plan
from ds_llmpq.wording import format_number


def solved(seed, **options):
    """(problem object, plan) of the first feasible random problem from `seed` on."""
    while True:
        obj = random_problem(seed, **{"mode": "theta", **options})
        try:
            return obj, solve(obj, solver="search", gap=0)
        except InfeasibleError:
            seed += 1000


def never_worse_than_baselines(seed):
    obj = random_problem(seed, alone=seed % 2 == 1)
    problem = Problem.from_json(obj)
    try:
        plan = solve(obj, solver="search")
    except InfeasibleError:
        return 0
    compared = 0
    for baseline in all_baselines(problem).values():
        if baseline.assignment is not None and not violations(problem, baseline.assignment):
            reached = objective_value(problem, evaluate(problem, baseline.assignment))
            assert plan.solver.objective <= reached * (1 + 1e-12)
            compared += 1
    return compared


def test_limits_that_exclude_one_another_are_seen_at_once():
    """One device, on which narrow widths are slow ones: boxes of short times allow only the widest, memory allows it to
    half of the layers. Each limit alone can be kept, so only both multipliers together close such a box; there are too
    many layers to cost all compositions of widths."""
    layers, bits = 40, (3, 4, 8, 16)
    sizes = {"prefill": (2, 4, 8), "decode": (8, 16, 32)}
    seconds = {"prefill": (25.1e-3, 16.1e-3, 14.8e-3, 9.2e-3), "decode": (17.7e-3, 8.8e-3, 7.4e-3, 1.8e-3)}

    def by_size(phase, per_row, fixed):
        return {str(size): fixed + per_row * size / sizes[phase][0] for size in sizes[phase]}

    kind = {"bits": list(bits)}
    for phase in sizes:
        kind[f"{phase}_layer_seconds"] = {
            str(b): by_size(phase, 0.3 * s, 0.7 * s) for b, s in zip(bits, seconds[phase], strict=True)
        }
        kind |= {f"{phase}_{end}_seconds": by_size(phase, 0.0, 0.0) for end in ("embed", "head")}
    obj = {
        "schema": 1,
        "layers": layers,
        "bits": list(bits),
        "workload": {"sequences": 32, "prompt_tokens": 512, "generated_tokens": 100},
        "micro_batches": {phase: list(values) for phase, values in sizes.items()},
        "device_types": {"gpu": kind},
        "devices": [{"name": "n0:0", "type": "gpu", "memory_bytes": 984_000}],
        "device_order": "free",
        "memory": {
            "layer_bytes": {"3": 16_420, "4": 17_365, "8": 22_089, "16": 30_947},
            "kv_bytes_per_sequence_layer": 0,
            "embed_bytes": 0,
            "head_bytes": 0,
            "tied_head": True,
            "workspace_bytes": {phase: {str(size): 0 for size in sizes[phase]} for phase in sizes},
        },
        "links": {
            "default": {"latency_seconds": 0.0, "seconds_per_byte": 0.0},
            "pairs": [],
            "hidden_bytes_per_token": 1000,
            "token_bytes": 8,
        },
        "sensitivity": [[7.5e-3, 1.35e-3, 4.7e-6, 0.0]] * layers,
        "objective": {"mode": "theta", "theta": 1.0},
    }
    # The prices of the search prove 99 % of the objective, and little more: the rest is the whole numbers' own.
    plan = solve(obj, solver="search", gap=1 / 99, time_limit_seconds=60, baselines=False)
    assert plan.solver.status == "optimal"
    assert plan.stages[0].bits.count(16) >= 20


def test_never_worse_than_any_baseline():
    assert sum(never_worse_than_baselines(seed) for seed in range(20)) > 20


@pytest.mark.slow
def test_never_worse_than_any_baseline_on_five_hundred():
    assert sum(never_worse_than_baselines(seed) for seed in range(2000, 2500)) > 500


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 7), devices=st.integers(1, 4))
def test_a_plan_never_breaks_a_rule(seed, layers, devices):
    obj = random_problem(seed, layers=layers, devices=devices)
    try:
        plan = solve(obj, solver="search", gap=0.05, time_limit_seconds=5)
    except UserError:
        reject()  # 40 examples that have a plan are looked at
    problem = Problem.from_json(obj)
    assert violations(problem, plan.assignment()) == []
    assert plan.predicted == evaluate(problem, plan.assignment()).summary()
    assert plan.solver.bound <= plan.solver.objective * (1 + 1e-9)


def test_pins_are_respected_and_cost_something():
    assert sum(pins_are_respected(seed) for seed in range(8)) >= 28  # of 32: a pinned width may leave no plan


def pins_are_respected(seed):
    """How many pinned problems had a plan."""
    obj, free = solved(seed, layers=4, devices=3)
    width, made = obj["bits"][0], 0
    last = free.stages[-1]
    for pins in (
        {"bits": {"0": width, "3": free.stages[-1].bits[-1]}},
        {"order": [stage.device for stage in free.stages]},
        {"layers": {last.device: list(last.layers)}},
        {"micro_batch": asdict(free.micro_batch)},
    ):
        try:
            plan = solve(obj, solver="search", gap=0, pins=pins)
        except InfeasibleError:
            assert "bits" in pins  # all other pins are taken from a feasible plan
            continue
        assert plan.solver.objective >= free.solver.objective * (1 - 1e-9)
        exact = solve(obj, solver="highs", gap=0, pins=pins)
        assert plan.solver.objective == pytest.approx(exact.solver.objective, rel=1e-6)
        if "bits" in pins:
            assert plan.stages[0].bits[0] == width
        else:
            assert plan.solver.objective == pytest.approx(free.solver.objective, rel=1e-9)
        made += 1
    return made


def test_malformed_pins_give_their_sentence():
    obj, plan = solved(1, layers=4, devices=2)
    name = plan.stages[0].device
    for pins, sentence in (
        ({"orders": []}, "unknown key"),
        ({"order": ["nowhere"]}, "pins.order"),
        ({"order": [name, name]}, "each device once"),
        ({"layers": {name: [2, 9]}}, "within 4 layers"),
        ({"bits": {"7": 4}}, "layers are 0 to 3"),
        ({"bits": {"01": 4}}, "pins.bits has the key '01', but must be a whole number"),
        ({"bits": {" 1": 4}}, "has the key ' 1'"),
        ({"bits": {"1.0": 4}}, "has the key '1.0'"),
        ({"bits": {"0": 4.0}}, "pins.bits.0 is 4.0"),
        ({"bits": {"0": 5}}, "pins.bits.0"),
        ({"micro_batch": {"prefill": 99}}, "pins.micro_batch.prefill"),
    ):
        with pytest.raises(UserError, match=sentence):
            solve(obj, pins=pins)
    problem = Problem.from_json(obj)
    assert Pins.from_json(None, problem) == Pins.from_json({"order": None}, problem) == Pins()
    kept = Pins(order=(name,), layers={name: (0, 4)}, bits={2: problem.bits[0]})
    assert Pins.from_json(kept, problem) == kept


def test_progress_reports_a_closing_gap():
    events = []
    obj = random_problem(6, layers=10, devices=3, widths=3, mode="theta")
    solve(obj, solver="search", progress=events.append)
    bounds = [event.bound for event in events if event.bound is not None]
    values = [event.incumbent for event in events if event.incumbent is not None]
    assert bounds == sorted(bounds)
    assert values == sorted(values, reverse=True)
    assert events[-1].gap <= 0.01 + 1e-12


def test_interruption_keeps_the_incumbent_and_a_valid_bound():
    obj = random_problem(6, layers=10, devices=3, widths=3, mode="theta")
    complete = solve(obj, solver="search", gap=0.001)

    def stop(event):
        if event.incumbent is not None and event.bound > 0:
            raise KeyboardInterrupt

    plan = solve(obj, solver="search", gap=0.001, progress=stop)
    assert plan.solver.status == "interrupted"
    assert plan.solver.bound <= complete.solver.objective * (1 + 1e-9)
    assert violations(Problem.from_json(obj), plan.assignment()) == []


def test_time_limit_keeps_a_valid_bound():
    obj = random_problem(6, layers=10, devices=3, widths=3, mode="theta")
    plan = solve(obj, solver="search", gap=0.0, time_limit_seconds=1e-6)
    assert plan.solver.status == "time_limit"
    assert plan.solver.bound <= solve(obj, solver="search").solver.objective


def test_zero_memory_is_explained():
    obj = random_problem(0, layers=3, devices=2)
    for device in obj["devices"]:
        device["memory_bytes"] = 0
    with pytest.raises(InfeasibleError, match="No plan fits the memory") as caught:
        solve(obj)
    assert "lacks about" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_smaller_batch_is_proposed_and_suffices():
    obj = random_problem(1, layers=3, devices=1, widths=1, sizes=1, mode="theta")
    obj["memory"].update(kv_bytes_per_sequence_layer=1e7, embed_bytes=0, head_bytes=0)
    obj["workload"]["sequences"] = 16
    weights = obj["memory"]["layer_bytes"][str(obj["bits"][0])]
    total = sum(weights) if isinstance(weights, list) else 3 * weights
    obj["devices"][0]["memory_bytes"] = total + 5.5 * 3e7 + 1e7
    with pytest.raises(InfeasibleError, match="at most 5 sequences instead of 16"):
        solve(obj)
    obj["workload"]["sequences"] = 5
    solve(obj, solver="search")


def test_no_latencies_at_all_are_explained():
    obj = random_problem(0, layers=2, devices=1)
    for kind in obj["device_types"].values():
        kind["decode_layer_seconds"] = {bits: {} for bits in kind["decode_layer_seconds"]}
    with pytest.raises(InfeasibleError, match="No device can run any layer"):
        solve(obj)


@pytest.mark.parametrize("mode", ["max_quality_loss", "max_latency"])
def test_an_impossible_limit_names_the_least_possible(mode):
    obj, _ = solved(4, layers=3, devices=2)
    strict = {**copy.deepcopy(obj), "objective": {"mode": mode, "limit": 1e-9}}
    with pytest.raises(InfeasibleError, match=r"problem\.objective\.limit\)? to") as caught:
        solve(strict, solver="search")
    least = float(re.split(r"limit\)? to ", str(caught.value))[1].rstrip(".").split(" or ")[0])
    loose = {**obj, "objective": {"mode": mode, "limit": least * 1.001}}
    assert solve(loose, solver="search").stages


def quantizing_gains(share):
    """A problem with room for all at 16 bits, where a layer at 4 bits takes `share` less time."""
    obj = random_problem(3, layers=4, devices=2, widths=2, mode="max_quality_loss")
    obj["bits"], obj["objective"] = [4, 16], {"mode": "max_quality_loss", "limit": 1.0, "theta": 0.0}
    obj["sensitivity"] = [[0.2, 0.0]] * 4
    obj["devices"] = [device | {"memory_bytes": 10**15} for device in obj["devices"]]
    obj["memory"]["layer_bytes"] = {"4": 1000, "16": 4000}
    for kind in obj["device_types"].values():
        kind["bits"] = [4, 16]
        for phase in ("prefill", "decode"):
            times = {str(size): 1.0 for size in obj["micro_batches"][phase]}
            kind[f"{phase}_layer_seconds"] = {"16": times, "4": {size: 1.0 - share for size in times}}
    return obj


def test_what_gains_too_little_is_not_quantized():
    for share, quantized in ((0.0, False), (0.009, False), (0.2, True)):
        plan = solve(quantizing_gains(share), solver="search", gap=0, least_gain=0.01)
        assert any(width < 16 for stage in plan.stages for width in stage.bits) is quantized
        fastest = solve(quantizing_gains(share), solver="search", gap=0).predicted
        assert plan.predicted.latency_seconds <= 1.01 * fastest.latency_seconds
        assert plan.predicted.quality_loss <= fastest.quality_loss
        assert plan.solver.gap <= 0.0101
    assert "Quantized" in plan.explanation[0]
    assert "of the 1 allowed" in plan.explanation[0]


def with_errors(obj, prefill, decode):
    errors = {"prefill_error": prefill, "decode_error": decode}
    return obj | {"device_types": {name: kind | errors for name, kind in obj["device_types"].items()}}


def is_quantized(plan):
    return any(width < 16 for stage in plan.stages for width in stage.bits)


def test_nothing_is_quantized_for_a_gain_that_the_times_are_not_sure_of():
    obj = quantizing_gains(0.2)
    fastest = solve(obj, solver="search", gap=0)
    whole = solve(leave_unquantized(Problem.from_json(obj)), solver="search", gap=0)
    gain = whole.predicted.latency_seconds / fastest.predicted.latency_seconds - 1
    assert gain > 0.1
    for error, quantized in ((0.0, True), (0.9 * gain, True), (1.1 * gain, False), (30.0, False)):
        unsure = with_errors(obj, error, error)
        plan = solve(unsure, solver="search", gap=0, least_gain=0.01)
        assert is_quantized(plan) is quantized
        gained, off = (format_number(100 * share, 2) for share in (gain, error))
        assert f"{gained} % faster, by times that are off by {off} % (measured);" in plan.explanation[0]
        assert plan.explanation[0].startswith("Quantized: " if quantized else "Not quantized: a plan with ")
        assert ("Not quantized" in describe_plan(plan)) is not quantized
        assert is_quantized(solve(unsure, solver="search", gap=0)), "the fastest plan was asked for"
    plan = solve(obj, solver="search", gap=0, least_gain=0.01)
    assert "by times whose error is not known;" in plan.explanation[0]


def test_a_plan_that_was_given_is_not_said_to_be_faster():
    obj = quantizing_gains(0.2)
    given = check_plan(obj, solve(obj, solver="search", gap=0).assignment())
    assert "because that plan was asked for;" in given.explanation[0]


def test_a_phase_is_as_unsure_as_its_worst_device_type_and_counts_as_its_share_of_the_time():
    obj = with_errors(quantizing_gains(0.2), 0.5, 0.1)
    devices, sizes = obj["devices"], obj["micro_batches"]
    stages = [StageAssignment(device["name"], 2 * j, 2 * j + 2, (4, 16)) for j, device in enumerate(devices)]
    assignment = Assignment(tuple(stages), sizes["prefill"][0], sizes["decode"][0])
    seen = evaluate(Problem.from_json(obj), assignment)
    prefill, decode = seen.prefill_seconds, seen.decode_seconds
    assert min(prefill, decode) > 0
    expected = (0.5 * prefill + 0.1 * decode) / (prefill + decode)
    assert find_time_error(Problem.from_json(obj), assignment) == pytest.approx(expected)
    obj["device_types"]["other"] = other = obj["device_types"][devices[1]["type"]] | {"prefill_error": 0.7}
    devices[1]["type"] = "other"
    expected = (0.7 * prefill + 0.1 * decode) / (prefill + decode)
    assert find_time_error(Problem.from_json(obj), assignment) == pytest.approx(expected)
    other["decode_error"] = None
    assert find_time_error(Problem.from_json(obj), assignment) is None


def test_the_best_plan_stays_where_it_has_no_quantized_layers_though_a_slower_one_was_found_first():
    problem = Problem.from_json(with_errors(quantizing_gains(0.2), 30.0, 30.0))
    best = solve(leave_unquantized(problem), solver="search", gap=0).assignment()
    others = [replace(best, prefill_micro_batch=size) for size in problem.micro_batches.prefill]
    slower = max(others, key=lambda other: evaluate(problem, other).latency_seconds)
    seconds = evaluate(problem, best).latency_seconds
    assert 1.001 < evaluate(problem, slower).latency_seconds / seconds < 1 + find_time_error(problem, best)
    found = SimpleNamespace(assignment=best, prediction=evaluate(problem, best))
    assert _prefer_unquantized(SimpleNamespace(problem=problem, best=found), slower, 0.001) == (best, None)


def test_memory_asks_for_bits_whatever_the_error():
    obj = quantizing_gains(0.2)
    obj["memory"] |= dict.fromkeys(("embed_bytes", "head_bytes", "kv_bytes_per_sequence_layer"), 0)
    for by_size in obj["memory"]["workspace_bytes"].values():
        by_size.update(dict.fromkeys(by_size, 0))
    obj["devices"] = [device | {"memory_bytes": 6000} for device in obj["devices"]]
    known, unknown = (
        solve(with_errors(obj, error, error), solver="search", gap=0, least_gain=0.01) for error in (30.0, None)
    )
    assert known.assignment() == unknown.assignment()
    assert is_quantized(known)
    assert "because they do not fit the devices' memory otherwise;" in known.explanation[0]


def test_one_layer_on_one_device():
    _, plan = solved(0, layers=1, devices=1)
    assert len(plan.stages) == 1
    assert plan.stages[0].layers == (0, 1)


def test_unknown_options_are_refused():
    obj = random_problem(0)
    for options in ({"solver": "cplex"}, {"gap": -1}, {"time_limit_seconds": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            solve(obj, **options)


def test_pareto_front_is_a_front():
    obj, _ = solved(8, layers=6, devices=2, widths=3)
    plans = pareto(obj, points=5, time_limit_seconds=20, solver="search")
    latencies = [plan.predicted.latency_seconds for plan in plans]
    losses = [plan.predicted.quality_loss for plan in plans]
    assert len(plans) >= 2
    assert latencies == sorted(latencies)
    assert losses == sorted(losses, reverse=True)


def test_imports_neither_frameworks_nor_solvers():
    import subprocess
    import sys

    code = (
        "import sys, ds_llmpq.planner; "
        "print([m for m in ('torch','transformers','deepspeed','gurobipy','highspy','scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("mode", ["max_quality_loss", "max_latency"])
def test_an_impossible_limit_of_a_large_problem_is_proven_at_once(mode):
    """80 layers of unequal bytes on 16 devices with little memory: the refusal comes soon and names a good plan."""
    obj = random_problem(1, layers=80, devices=16, widths=4, types=2, mode=mode)
    for kind in obj["device_types"].values():
        kind["bits"] = obj["bits"]
    theta = 1e6 if mode == "max_quality_loss" else 0.0
    least = solve({**obj, "objective": {"mode": "theta", "theta": theta}}, baselines=False, time_limit_seconds=200)
    value = least.predicted.quality_loss if mode == "max_quality_loss" else least.predicted.latency_seconds
    assert value > 0
    for share in (0.0, 0.5, 0.97):
        started = time.process_time()
        with pytest.raises(InfeasibleError, match="none has less than") as caught:
            solve({**obj, "objective": {"mode": mode, "limit": share * value}}, time_limit_seconds=400)
        assert time.process_time() - started < 60  # 3 where this was written
        named = float(re.search(r"the best found has ([\d.e-]+)", str(caught.value))[1])
        assert named <= value * 1.05
