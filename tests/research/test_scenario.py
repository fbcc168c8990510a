"""Jobs as configuration describes them; what the published evaluation measures on them."""

import json

import numpy as np
import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.research.config import AnswersConfig, ArrivalsConfig, PredictionConfig, SimulateConfig
from ds_llmpq.research.published_ssjf import compute_published_ratios
from ds_llmpq.research.scenario import make_jobs, predict_classes
from ds_llmpq.scheduler.execution import ConstantCost

COST = ConstantCost()


def settings(**changes):
    return SimulateConfig(**{"jobs": 4000, "arrivals": ArrivalsConfig(load=0.8), **changes})


def test_the_default_classes_are_as_good_as_the_published_ones():
    jobs, lengths = make_jobs(settings(), COST, 0)
    true = jobs.generated_tokens
    actual = np.digitize(true, np.percentile(true, [25, 50, 75, 99]), right=True)
    assert np.mean(actual == lengths.classes) == pytest.approx(0.60, abs=0.03)
    assert len(np.unique(jobs.predicted_tokens)) == 5
    rate = 1 / np.diff(jobs.arrival_seconds).mean()
    assert rate * (0.1 + 0.02 * true.mean()) == pytest.approx(0.8, rel=0.05)


def test_a_seed_gives_the_same_jobs_and_another_seed_others():
    one, again, other = (make_jobs(settings(), COST, seed)[0] for seed in (3, 3, 4))
    assert (one.generated_tokens == again.generated_tokens).all()
    assert (one.arrival_seconds == again.arrival_seconds).all()
    assert (one.generated_tokens != other.generated_tokens).any()


def test_lengths_and_predictions_come_from_a_file(tmp_path):
    file = tmp_path / "predictions.jsonl"
    rows = [{"output_tokens": 10 * n, "prompt_tokens": n, "predicted_tokens": 9.0 * n} for n in range(1, 21)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = AnswersConfig(kind="data", data=str(file))
    jobs, _ = make_jobs(settings(jobs=20, answers=answers, prediction=PredictionConfig("data")), COST, 0)
    assert sorted(jobs.generated_tokens) == [10 * n for n in range(1, 21)]
    assert jobs.predicted_tokens == pytest.approx(0.9 * jobs.generated_tokens)


def test_published_throughput_gain_is_in_the_moment_it_is_measured():
    jobs, lengths = make_jobs(settings(jobs=50, arrivals=ArrivalsConfig(rate=1.0)), COST, 1)
    ratios = compute_published_ratios(jobs, lengths, "none", 1)
    assert ratios["throughput_at_quarter"] > 1.5
    assert ratios["throughput_whole_run"] == pytest.approx(1.0)
    assert ratios["jct_mean"] < 0.9
    assert compute_published_ratios(jobs, lengths, "continuous", 4) is None


def test_classes_are_decoded_to_their_means():
    true = np.array([1.0, 2.0, 10.0, 20.0])
    tokens, classes = predict_classes(true, true, [50])
    assert (tokens.tolist(), classes.tolist()) == ([1.5, 1.5, 15.0, 15.0], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jobs": 0}, "jobs is 0"),
        ({"answers": AnswersConfig(kind="x")}, "answers.kind is 'x'"),
        ({"answers": AnswersConfig(kind="data")}, "answers.data"),
        ({"answers": AnswersConfig(kind="data", data="/nowhere")}, "cannot be read"),
        ({"prediction": PredictionConfig("x")}, "prediction.kind is 'x'"),
        ({"prediction": PredictionConfig("data")}, "predicted_tokens"),
        ({"prediction": PredictionConfig(percentiles=[50, 25])}, "must rise"),
        ({"arrivals": ArrivalsConfig(load=0.0)}, "arrivals.load is 0.0"),
        ({"arrivals": ArrivalsConfig(kind="trace")}, "arrivals.trace=FILE"),
    ],
)
def test_a_mistake_is_one_sentence(changes, said):
    with pytest.raises(UserError, match=said):
        make_jobs(settings(**changes), COST, 0)
