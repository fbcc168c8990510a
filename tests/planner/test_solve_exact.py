"""The whole-problem models are equal to brute force."""

import pytest
from brute_force import brute_force
from random_problems import random_problem

from ds_llmpq.errors import InfeasibleError
from ds_llmpq.plan import Plan
from ds_llmpq.planner import Problem, solve


def test_highs_equals_brute_force():
    assert sum(highs_equals_brute_force(seed) for seed in range(30)) >= 18  # the others have no plan


def highs_equals_brute_force(seed):
    """Whether there is a plan; HiGHS says the same, and finds one as good."""
    obj = random_problem(seed, alone=seed % 2 == 1)
    expected = brute_force(obj)
    if expected is None:
        with pytest.raises(InfeasibleError):
            solve(obj, solver="highs", gap=0)
        return False
    plan = solve(obj, solver="highs", gap=0)
    assert plan.solver.objective == pytest.approx(expected[0], rel=1e-6, abs=1e-9)
    assert plan.solver.bound <= expected[0] * (1 + 1e-6)
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert Problem.from_json(Problem.from_json(obj).to_json()) == Problem.from_json(obj)
    return True
