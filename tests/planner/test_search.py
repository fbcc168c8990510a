"""The specialised search is exact: equal to brute force in every mode, with a bound that holds."""

import pytest
from brute_force import brute_force
from random_problems import random_problem

from ds_llmpq.errors import InfeasibleError
from ds_llmpq.planner import Problem, solve, violations

MODES = ("theta", "max_quality_loss", "max_latency")


def check_against_brute_force(obj, solver="search"):
    expected = brute_force(obj)
    if expected is None:
        with pytest.raises(InfeasibleError):
            solve(obj, solver=solver, gap=0)
        return False
    plan = solve(obj, solver=solver, gap=0)
    assert plan.solver.objective == pytest.approx(expected[0], rel=1e-7, abs=1e-9)
    assert plan.solver.bound <= expected[0] * (1 + 1e-7) + 1e-12
    assert plan.solver.gap <= 1e-6
    assert violations(Problem.from_json(obj), plan.assignment()) == []
    return True


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equals_brute_force(mode, alone):
    assert sum(check_against_brute_force(random_problem(seed, mode=mode, alone=alone)) for seed in range(25)) >= 15


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
def test_equals_brute_force_on_a_thousand(mode):
    problems = (random_problem(seed, mode=mode, alone=seed % 2 == 1) for seed in range(1000, 1334))
    assert sum(map(check_against_brute_force, problems)) > 200  # the rest is infeasible, and said to be so


def test_auto_equals_brute_force():
    problems = (random_problem(100 + seed, alone=seed % 2 == 1) for seed in range(12))
    assert sum(check_against_brute_force(problem, solver="auto") for problem in problems) >= 6


def test_bound_and_gap_hold_on_medium_problems():
    solved = [
        _agree(random_problem(seed, layers=10, devices=4, widths=3, types=2), 0.01, ("search", "highs"))
        for seed in range(6)
    ]
    assert sum(solved) >= 4  # the others are infeasible to both


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_solvers_agree_on_many_medium_problems():
    solved = 0
    for seed in range(200):
        obj = random_problem(5000 + seed, layers=8, devices=3, widths=2, types=2)
        solved += _agree(obj, 0.01, ("search", "highs", "gurobi") if seed % 4 == 0 else ("search", "highs"))
    assert solved > 120


def _agree(obj, gap, solvers):
    """Whether the problem has a plan, as all solvers see it; and if so, that each plan keeps the bounds of all."""
    plans = []
    for solver in solvers:
        try:
            plans.append(solve(obj, solver=solver, gap=gap, baselines=False))
        except InfeasibleError:
            plans.append(None)
    assert len({plan is None for plan in plans}) == 1
    if plans[0] is None:
        return False
    bound = max(plan.solver.bound for plan in plans)
    for plan in plans:
        assert plan.solver.gap <= gap + 1e-9
        assert plan.solver.objective / (1 + gap) * (1 - 1e-6) <= min(p.solver.objective for p in plans) + 1e-9
        assert bound <= plan.solver.objective * (1 + 1e-6) + 1e-9
    return True


def test_deterministic_for_a_seed():
    obj = random_problem(7, layers=12, devices=4, widths=3, types=2, mode="theta")
    first, second = (solve(obj, seed=3).to_json() for _ in range(2))
    for plan in (first, second):
        del plan["solver"]["seconds"]
    assert first == second
