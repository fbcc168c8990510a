"""Lesser planners: each keeps its own restriction, is costed by the real formula, and never beats the bound."""

import sys
from pathlib import Path

import pytest

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.planner import Problem, solve, violations
from ds_llmpq.planner.objective import evaluate
from ds_llmpq.research.ablations import VARIANTS, evaluate_reference, merge_layers, solve_ablation

sys.path.append(str(Path(__file__).parents[1] / "planner"))
from random_problems import random_problem
from test_objective import by_hand, two_stages


def problems():
    found = []
    seed = 0
    while len(found) < 6:
        record = random_problem(seed, layers=4, sizes=2, mode="theta")
        seed += 1
        problem = Problem.from_json(record)
        shared = set(problem.micro_batches.prefill) & set(problem.micro_batches.decode)
        if shared and problem.workload.generated_tokens > 1:
            try:
                found.append((problem, solve(problem, solver="search", gap=1e-6)))
            except InfeasibleError:
                continue
    return found


PROBLEMS = problems()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_beats_the_bound(variant):
    made = 0
    for problem, best in PROBLEMS:
        try:
            plan = solve_ablation(problem, variant, 2, solver="search")
        except InfeasibleError:
            continue
        made += 1
        assert not violations(problem, plan.assignment())
        assert plan.predicted.latency_seconds == pytest.approx(evaluate(problem, plan.assignment()).latency_seconds)
        assert plan.solver.objective >= best.solver.bound * (1 - 1e-9)
        if variant == "equal_micro_batches":
            assert plan.micro_batch.prefill == plan.micro_batch.decode
        if variant == "grouped":
            bits = [width for stage in plan.stages for width in stage.bits]
            assert all(a == b for a, b in zip(bits[::2], bits[1::2], strict=True))
    assert made >= 2


def test_a_grouped_plan_costs_what_its_layers_cost():
    made = 0
    for problem, _ in PROBLEMS:
        coarse = merge_layers(problem, 2)
        try:
            plan = solve_ablation(problem, "grouped", 2, solver="search")
            same = solve(coarse, solver="search")
        except InfeasibleError:
            continue
        assert plan.predicted.latency_seconds == pytest.approx(same.predicted.latency_seconds)
        assert plan.predicted.quality_loss == pytest.approx(same.predicted.quality_loss)
        made += 1
    assert made >= 2


def test_the_published_latency_by_hand():
    prefill, decode = 1.5 + 2.25 + 2 * 2.25, 0.15 + 0.32 + (2 - 1) * 2 * 0.32
    assert evaluate_reference(by_hand(), two_stages()) == pytest.approx(prefill + decode + 10 * 1.25)


@pytest.mark.parametrize("seed", [2, 36])
def test_a_plan_for_the_published_latency_is_better_by_it_than_the_full_one(seed):
    problem = Problem.from_json(random_problem(seed, layers=5, devices=2, sizes=2, widths=3, mode="theta"))
    best = solve(problem, solver="search", gap=1e-6)
    plan = solve_ablation(problem, objective="reference", solver="search", gap=1e-6)
    assert not violations(problem, plan.assignment())
    own, full = (evaluate_reference(problem, entry.assignment()) for entry in (plan, best))
    assert own < 0.9 * full
    assert plan.solver.objective >= best.solver.bound * (1 - 1e-9)  # costed as any plan is


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("best", {}, "ablation.variant"),
        ("grouped", {"group_layers": 5}, "must divide"),
        ("grouped", {"group_layers": 0}, "must divide"),
        ("phase_blind", {"pins": {"micro_batch": {"decode": 2}}}, "knows no planner.pins"),
        ("full", {"objective": "mine"}, "ablation.objective"),
        ("grouped", {"objective": "reference"}, "needs ablation.variant=full"),
    ],
)
def test_a_mistake_is_one_sentence(variant, options, said):
    problem = PROBLEMS[0][0]
    with pytest.raises(UserError, match=said):
        solve_ablation(problem, variant, **options)
