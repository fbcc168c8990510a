"""Scripts of the experiments: tuning to a target, the paper's table, times by phase."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_llmpq import config
from ds_llmpq.errors import UserError
from ds_llmpq.planner import Problem, solve
from ds_llmpq.research.published_costs import SOURCES
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import make_plan

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(*overrides):
    return config.to_object(config.compose_settings("plan", list(overrides)), PlanConfig)


class Study:
    """A stand-in for Optuna that tries what it is told to try, then a grid."""

    def __init__(self, grid):
        self.grid = list(grid)

    def enqueue_trial(self, given):
        self.grid.insert(0, given["theta"])

    def optimize(self, objective, n_trials):
        for number, theta in enumerate(self.grid[:n_trials]):
            value = objective(SimpleNamespace(number=number, suggest_float=lambda *_, theta=theta, **__: theta))
            assert value > 0


def stub(*grid):
    study = Study(grid)
    return SimpleNamespace(
        create_study=lambda sampler: study, samplers=SimpleNamespace(TPESampler=lambda seed: None)
    )  # fmt: skip


def test_the_fastest_trial_within_the_target_wins(tmp_path):
    tune = script("tune_theta").tune
    made = settings("cluster=demo_cpu2", "workload=demo", "quant.bits=[3,4,8]", "planner.solver=search")
    found = tune(stub(1e-3, 1.0), made, 0.5, 3, 0, tmp_path)
    assert found["quality_loss"] <= 0.5
    assert (tmp_path / found["folder"] / "plan.json").is_file()
    with pytest.raises(UserError, match="the least was"):
        tune(stub(1.0), made, 1e-9, 2, 0, tmp_path)


def test_a_fixed_micro_batch_never_helps_a_baseline(tmp_path):
    paper_table = script("paper_table")
    made = settings("+experiment=paper", "cluster=cluster9", "cost.source=published", "planner.solver=search")
    made.planner.micro_batches.prefill, made.planner.micro_batches.decode = [1, 8], [8, 32]
    plan = make_plan(made, tmp_path, sources=SOURCES)
    problem = Problem.from_json(json.loads((tmp_path / "problem.json").read_text()))
    fixed = paper_table.at_fixed_micro_batch(problem)
    for name in paper_table.NAMES:
        assert fixed[name] <= paper_table._speed(plan.baselines[name]) * (1 + 1e-9)
    # the paper measured 2.7 tokens/s of both there: 8 bits do not fit at 8 sequences, and 4 bits are slow
    assert fixed["uniform"] == pytest.approx(2.7, rel=0.2)
    assert solve(problem, solver="search").predicted.throughput_tokens_per_second > 5 * fixed["uniform"]


def test_times_are_of_every_device_width_and_phase(tmp_path):
    phase_times = script("phase_times")
    rows = phase_times.times(settings("+experiment=motivation"))
    assert len(rows) == 2 * 2 * 4 * 4
    one = {"source": "published", "phase": "prefill", "device": "t4", "bits": 4}
    assert next(r["milliseconds"] for r in rows if one.items() <= r.items()) == pytest.approx(11204)
    phase_times.draw(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
