"""The cheapest devices that finish in time, against planning for every subset of the devices."""

import itertools
from dataclasses import replace

import pytest
from random_problems import random_problem

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.planner import Problem, solve
from ds_llmpq.planner.deadline import solve_by_deadline
from ds_llmpq.planner.problem import Objective

EXACT = {"solver": "search", "gap": 0.0}


def with_limit(seed, **options):
    """A problem that minimises latency under a loose bound on quality."""
    problem = Problem.from_json(random_problem(seed, mode="max_quality_loss", **options))
    return replace(problem, objective=Objective("max_quality_loss", limit=2.0 * problem.layers))


def every_choice(problem, prices):
    """(cost, seconds) of the plan for each subset of the devices that has one; the planner itself has its own tests."""
    names = [device.name for device in problem.devices]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            try:
                plan = solve(problem.with_devices(chosen), **EXACT)
            except InfeasibleError:
                continue
            used = [stage.device for stage in plan.stages]
            seconds = plan.predicted.latency_seconds
            price = prices(used)
            yield (len(used) if price is None else price * seconds / 3600, seconds)


def price_list(problem, seed):
    own = {device.name: 0.5 + (seed + 3 * i) % 4 for i, device in enumerate(problem.devices)}
    return lambda names: sum(own[name] for name in names)


@pytest.mark.parametrize("priced", [False, True])
def test_the_least_cost_of_all_subsets_is_found(priced):
    compared = refused = fewer = 0
    for seed in range(300, 305):
        problem = with_limit(seed, layers=4, devices=3, types=2)
        prices = price_list(problem, seed) if priced else lambda names: None
        choices = list(every_choice(problem, prices))
        if not choices:
            continue
        times = sorted(seconds for _, seconds in choices)
        for deadline in (times[0] * 0.9, times[0] * 1.0001, times[len(times) // 2] * 1.0001, times[-1] * 1.0001):
            within = [key for key in choices if key[1] <= deadline]
            if not within:
                with pytest.raises(InfeasibleError, match=r"No devices of this cluster finish the batch within"):
                    solve_by_deadline(problem, deadline, prices, **EXACT)
                refused += 1
                continue
            plan = solve_by_deadline(problem, deadline, prices, **EXACT)
            used, seconds = [stage.device for stage in plan.stages], plan.predicted.latency_seconds
            price = prices(used)
            reached = len(used) if price is None else price * seconds / 3600
            assert seconds <= deadline
            assert reached == pytest.approx(min(within)[0], rel=1e-6)
            assert plan.explanation[1].startswith("Deadline ")
            compared += 1
            fewer += len(used) < len(problem.devices)
    assert min(compared, refused, fewer) > 2


@pytest.mark.parametrize("limit", [None, 10.0])
def test_a_high_theta_gives_way_to_the_deadline(limit):
    """Without a limit of the loss, the plan is the least lossy in time; with one, the fastest that keeps it."""
    kept = 0
    for seed in range(400, 410):
        problem = Problem.from_json(random_problem(seed, layers=5, devices=2, widths=3, mode="theta"))
        lossless = replace(problem, objective=Objective("theta", theta=1e6))
        try:
            fastest = solve(replace(problem, objective=Objective("theta", theta=0.0)), **EXACT)
            slow = solve(lossless, **EXACT)
        except InfeasibleError:
            continue
        between = (fastest.predicted.latency_seconds + slow.predicted.latency_seconds) / 2
        if slow.predicted.latency_seconds <= between * 1.01:
            continue
        if limit is not None:
            lossless = replace(problem, objective=Objective("max_quality_loss", theta=1e6, limit=limit))
        plan = solve_by_deadline(lossless, between, **EXACT)
        assert plan.predicted.latency_seconds <= between * (1 + 1e-9)
        assert plan.predicted.quality_loss <= fastest.predicted.quality_loss + 1e-9
        kept += 1
    assert kept > 1


def test_more_requests_than_sequences_take_time_in_proportion():
    problem = with_limit(300, layers=4, devices=3, types=2)
    prices, batch = price_list(problem, 300), problem.workload.sequences
    fastest = solve(problem, **EXACT).predicted.latency_seconds
    alone = solve_by_deadline(problem, 1.2 * fastest, prices, **EXACT)
    whole = solve_by_deadline(problem, 12 * fastest, prices, requests=10 * batch, **EXACT)
    assert whole.stages == alone.stages
    assert f" s for {10 * batch:,} requests: " in whole.explanation[1]
    assert solve_by_deadline(problem, 1.2 * fastest, prices, requests=1, **EXACT).stages == alone.stages
    with pytest.raises(InfeasibleError, match=rf"finish {10 * batch:,} requests within") as refusal:
        solve_by_deadline(problem, 1.2 * fastest, prices, requests=10 * batch, **EXACT)
    assert f"takes {10 * fastest:.4g} s" in str(refusal.value)


def test_sentences():
    problem = with_limit(300, layers=4, devices=4, types=2)
    with pytest.raises(UserError, match=r"^planner.deadline_seconds is 0, but must be above 0\.$"):
        solve_by_deadline(problem, 0)
    with pytest.raises(UserError, match=r"leave planner\.baseline and the pins order and layers out"):
        solve_by_deadline(problem, 10.0, baseline="uniform")
