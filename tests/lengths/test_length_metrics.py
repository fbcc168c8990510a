"""Metrics, tasks and calibration against direct definitions."""

from dataclasses import asdict

import numpy as np
import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.lengths.calibration import Calibration, find_conformal_quantile
from ds_llmpq.lengths.characterize import describe_distribution, estimate_maximum
from ds_llmpq.lengths.config import LengthTaskConfig
from ds_llmpq.lengths.length_metrics import measure_bounds, measure_classes, measure_regression, pairwise_accuracy
from ds_llmpq.lengths.tasks import LengthTask
from ds_llmpq.validation import validate

TOKENS = np.array([1.0, 2.0, 3.0, 4.0, 100.0, 200.0, 300.0, 400.0])


def test_errors_and_ranks():
    true, guess = np.array([10.0, 20.0, 40.0]), np.array([13.0, 16.0, 40.0])
    found = measure_regression(true, guess)
    assert found["mae_tokens"] == pytest.approx(7 / 3)
    assert found["rmse_tokens"] == pytest.approx((25 / 3) ** 0.5)
    assert (found["kendall_tau"], found["pairwise_accuracy"]) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_pairwise_accuracy_counts_pairs(seed):
    generator = np.random.default_rng(seed)
    true, guess = generator.integers(0, 6, (2, 30)).astype(float)
    pairs = [(i, j) for i in range(30) for j in range(i) if true[i] != true[j]]
    points = [0.5 + 0.5 * np.sign((true[i] - true[j]) * (guess[i] - guess[j])) for i, j in pairs]
    assert pairwise_accuracy(true, guess) == pytest.approx(np.mean(points))


def test_class_metrics_are_averages_over_the_classes_that_occur():
    found = measure_classes(np.array([0, 0, 1, 3]), np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.5
    assert found["within_one_accuracy"] == 0.75
    assert found["macro_precision"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_thresholds_are_percentiles_of_the_training_lengths_and_classes_their_means():
    task = LengthTask.fit(LengthTaskConfig(kind="multiclass", percentiles=[50, 75]), TOKENS)
    assert task.thresholds == (4.0, 200.0)
    assert task.class_tokens == pytest.approx((2.5, 150.0, 350.0))
    assert task.labels(np.array([1.0, 4.0, 5.0, 1e6])).tolist() == [0, 0, 1, 2]
    assert validate(LengthTask, asdict(task), "task", "mend it") == task


def test_targets_and_tokens_are_inverse():
    task = LengthTask.fit(LengthTaskConfig(), TOKENS)
    assert task.tokens(task.targets(TOKENS)) == pytest.approx(TOKENS)
    assert task.targets(TOKENS).mean() == pytest.approx(0.0)
    ordinal = LengthTask.fit(LengthTaskConfig(kind="binary_ordinal"), TOKENS)
    assert ordinal.nearest_class(np.array([-3.0, 0.4, 0.6, 9.0])).tolist() == [0, 0, 1, 1]


def test_equal_lengths_cannot_be_told_apart():
    with pytest.raises(UserError, match="nothing to tell apart"):
        LengthTask.fit(LengthTaskConfig(kind="binary"), np.full(20, 7.0))
    # a boundary at the largest length would make an empty class
    assert len(LengthTask.fit(LengthTaskConfig(kind="multiclass"), np.repeat([5.0, 9.0], [40, 60])).class_tokens) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LengthTaskConfig(kind="x"), "task.kind is 'x'"),
        (LengthTaskConfig(loss="x"), "task.loss is 'x'"),
        (LengthTaskConfig(quantiles=[1.5]), "task.quantiles"),
        (LengthTaskConfig(percentiles=[60, 40]), "task.percentiles"),
    ],
)
def test_a_wrong_task_is_one_sentence(config, said):
    with pytest.raises(UserError, match=said):
        LengthTask.fit(config, TOKENS)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_conformal_quantiles_cover_new_values(level):
    generator = np.random.default_rng(0)
    covered = [
        np.mean(generator.exponential(size=50) <= find_conformal_quantile(generator.exponential(size=200), level))
        for _ in range(400)
    ]
    assert level - 0.01 < np.mean(covered) < level + 0.02


def test_bounds_of_a_useless_model_still_cover():
    generator = np.random.default_rng(1)
    task = LengthTask.fit(LengthTaskConfig(), generator.lognormal(4, 1, 500))
    calibration = Calibration.fit(task, np.zeros((2000, 1)), generator.lognormal(4, 1, 2000))
    found = measure_bounds(generator.lognormal(4, 1, 5000), calibration.bounds(task, np.zeros((5000, 1))))
    assert found["q90_coverage"] == pytest.approx(0.9, abs=0.02)
    assert found["q95_coverage"] == pytest.approx(0.95, abs=0.02)
    assert validate(Calibration, asdict(calibration), "calibration", "mend it") == calibration


def test_no_bound_is_above_the_longest_answer_known():
    generator = np.random.default_rng(2)
    scores, tokens = generator.normal(size=(300, 1)), generator.integers(1, 65, 300)
    task = LengthTask.fit(LengthTaskConfig(), tokens)
    bounds = Calibration.fit(task, scores, tokens).bounds(task, np.full((10, 1), 9.0))
    assert all((bound <= 64).all() for bound in bounds.values())


def test_pairwise_scores_become_tokens_by_an_increasing_map():
    task = LengthTask.fit(LengthTaskConfig(kind="pairwise"), TOKENS)
    scores = np.array([[0.1], [0.3], [0.2], [0.9]])
    calibration = Calibration.fit(task, scores, np.array([5.0, 10.0, 30.0, 50.0]))
    # 30 at 0.2 and 10 at 0.3 are out of order: they share a block at 0.25
    assert calibration.point(task, np.array([[0.1], [0.25], [0.9], [5.0]])) == pytest.approx([5.0, 20.0, 50.0, 50.0])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_expected_maximum_is_the_mean_of_the_longest(rows):
    generator = np.random.default_rng(2)
    tokens = generator.lognormal(4, 1, 300).round()
    drawn = generator.choice(tokens, (40_000, rows)).max(1).mean()
    assert estimate_maximum(tokens, rows) == pytest.approx(drawn, rel=0.03)


def test_a_distribution_has_its_percentiles_and_tail():
    found = describe_distribution(np.arange(1.0, 101.0))
    assert (found["p50"], found["max"], found["answers"]) == (50.5, 100.0, 100.0)
    assert found["tail_ratio"] == pytest.approx(99.01 / 50.5)
