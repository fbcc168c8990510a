"""Predictors: near the noise ceiling, every task trains, saves, loads and predicts, bounds hold, nothing leaks."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.lengths import dataset
from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.lengths.length_metrics import measure_regression
from ds_llmpq.lengths.predictor import evaluate, load_predictor, train
from ds_llmpq.lengths.records import Example
from ds_llmpq.lengths.tasks import KINDS
from scripts.make_length_data import make_answers

CONFIG = LengthDataConfig()


def made(count, seed=0):
    """Synthetic data, and the best prediction by text, model and length."""
    found = make_answers(count, seed)
    examples = [Example(a.text, a.output_tokens, a.model, len(a.text.split()), str(n)) for n, a in enumerate(found)]
    return dataset.split(examples, CONFIG), {str(n): a.median_tokens for n, a in enumerate(found)}


@pytest.fixture(scope="module")
def small():
    return made(600)[0]


def test_the_default_is_within_a_quarter_of_the_noise_ceiling():
    data, best = made(4000)
    predictor = train(data, LengthTaskConfig(), ProxyConfig(), CONFIG)
    found = evaluate(predictor, data.test)
    ceiling = float(np.mean([abs(example.output_tokens - best[example.conversation]) for example in data.test]))
    assert found["mae_tokens"] < 1.25 * ceiling
    assert found["mae_of_constant_tokens"] > 2.5 * ceiling
    assert found["q90_coverage"] == pytest.approx(0.90, abs=0.035)
    assert found["q95_coverage"] == pytest.approx(0.95, abs=0.03)
    assert found["cpu_seconds_per_prediction"] > 0


@pytest.mark.parametrize("loss", ["l1", "mse", "quantile"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_trains_saves_loads_and_predicts(small, tmp_path, kind, loss):
    if loss != "l1" and kind in ("binary", "multiclass", "pairwise"):
        pytest.skip("has a loss of its own")
    predictor = train(small, LengthTaskConfig(kind=kind, loss=loss), ProxyConfig(features=2048), CONFIG)
    predictor.save(tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pkl", ".bin", ".pt")]
    loaded = load_predictor(tmp_path)
    one, other = predictor.predict(small.test), loaded.predict(small.test)
    assert one.tokens == pytest.approx(other.tokens, rel=1e-3)
    assert {name: pytest.approx(bound, rel=1e-3) for name, bound in other.bounds.items()} == one.bounds
    assert (one.bounds["q90"] <= one.bounds["q95"]).all()
    assert (one.classes is not None) == (kind not in ("regression", "pairwise"))
    assert loaded.task == predictor.task
    assert loaded.about["fingerprint"] == dataset.fingerprint(small.train)
    true = dataset.collect_lengths(small.test)
    assert measure_regression(true, one.tokens)["pairwise_accuracy"] > 0.65
    assert measure_regression(true, one.tokens)["mae_tokens"] < evaluate(loaded, small.test)["mae_of_constant_tokens"]


def test_predictions_do_not_look_at_lengths(small):
    predictor = train(small, LengthTaskConfig(), ProxyConfig(), CONFIG)
    hidden = [replace(example, output_tokens=99_999) for example in small.test]
    assert (predictor.predict(hidden).tokens == predictor.predict(small.test).tokens).all()


def test_thresholds_and_weights_come_from_the_training_split_alone(small):
    other = replace(small, test=tuple(replace(e, output_tokens=5 * e.output_tokens) for e in small.test))
    task = LengthTaskConfig(kind="multiclass")
    one, two = (train(data, task, ProxyConfig(), CONFIG) for data in (small, other))
    assert one.task == two.task
    assert (one.model.weights["coefficients"] == two.model.weights["coefficients"]).all()


def test_the_model_that_answers_counts_and_an_unknown_one_is_no_mistake(small):
    predictor = train(small, LengthTaskConfig(), ProxyConfig(), CONFIG)
    text = "Explain rain to a student."
    terse, chatty, unknown = predictor.predict(
        [Example(text, None, model, 5) for model in ("terse-7b", "chatty-13b", "new-1b")]
    ).tokens
    assert terse < chatty
    assert unknown > 0


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        (ProxyConfig(kind="x"), "proxy.kind is 'x'"),
        (ProxyConfig(features=1), "proxy.features is 1"),
        (ProxyConfig(alpha=-1.0), "proxy.alpha is -1.0"),
        (ProxyConfig(kind="encoder"), "needs proxy.path"),
        (ProxyConfig(kind="encoder", path="/nowhere"), "no config.json"),
    ],
)
def test_a_mistake_is_one_sentence(small, proxy, said):
    with pytest.raises(UserError, match=said):
        train(small, LengthTaskConfig(), proxy, CONFIG)


def test_a_folder_without_a_predictor_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="lengths train"):
        load_predictor(tmp_path)
    (tmp_path / "predictor.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(UserError, match="schema is 2"):
        load_predictor(tmp_path)


@pytest.mark.parametrize("damage", ["shape", "not a number", "quantile", "scores"])
def test_a_predictor_that_loads_but_cannot_predict_is_one_sentence(small, tmp_path, damage):
    from safetensors.numpy import load_file, save_file

    train(small, LengthTaskConfig(), ProxyConfig(features=64), CONFIG).save(tmp_path)
    assert load_predictor(tmp_path)
    described, weights = json.loads((tmp_path / "predictor.json").read_text()), tmp_path / "weights.safetensors"
    arrays = load_file(weights)
    if damage == "shape":
        described["model"]["columns"] = 128
    elif damage == "not a number":
        arrays["intercepts"] = arrays["intercepts"] * np.nan
    elif damage == "quantile":
        described["calibration"]["offsets"] = []
    else:
        del arrays["coefficients"]
    save_file(arrays, weights)
    (tmp_path / "predictor.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"; give a folder that `lengths train` wrote\.$") as caught:
        load_predictor(tmp_path)
    assert str(caught.value).count("\n") == 0
