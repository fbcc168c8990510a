"""Trains, applies, evaluates and stores predictors of output length; a folder holds JSON and safetensors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.files import check_files, read_json, refuse_unwritable, write_json
from ds_llmpq.lengths.calibration import Calibration, decode_classes, name_level
from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.lengths.dataset import Dataset, collect_lengths, fingerprint, hide_lengths
from ds_llmpq.lengths.length_metrics import measure_bounds, measure_classes, measure_regression
from ds_llmpq.lengths.ngrams import Features, NgramModel
from ds_llmpq.lengths.records import Example
from ds_llmpq.lengths.tasks import LengthTask
from ds_llmpq.validation import Amount, Label, Plain, one_of, validate

SCHEMA = 1
FILE_NAME = "predictor.json"
PROXIES = ("ngrams", "encoder")
_TIMED_ALONE = 30  # predictions that are timed one by one


@dataclass(frozen=True)
class Predictions:
    """`tokens` [n]; `bounds`: name (`q90`) -> [n] tokens; `classes` [n] where the task has classes."""

    tokens: np.ndarray
    bounds: dict[str, np.ndarray]
    classes: np.ndarray | None


@dataclass(frozen=True)
class Predictor:
    """`about`: fingerprint of the training data, settings, numbers of examples, training time."""

    task: LengthTask
    model: Any  # NgramModel or EncoderModel
    calibration: Calibration
    about: dict[str, Any]

    def predict(self, examples: Sequence[Example]) -> Predictions:
        """Predicts without looking at the lengths that the examples may hold."""
        if not examples:
            return Predictions(np.zeros(0), {}, None)
        scores = self.model.scores(hide_lengths(examples))
        return Predictions(
            self.calibration.point(self.task, scores),
            self.calibration.bounds(self.task, scores),
            decode_classes(self.task, scores) if self.task.has_classes else None,
        )

    def save(self, folder: Path) -> None:
        """Writes predictor.json and the weights. `UserError`: the folder cannot be written."""
        with refuse_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            described = {
                "schema": SCHEMA,
                "kind": self.model.kind,
                "task": asdict(self.task),
                "model": self.model.save(folder),
                "calibration": asdict(self.calibration),
                "about": self.about,
            }
            write_json(folder / FILE_NAME, described)


@dataclass(frozen=True)
class _PredictorFile:
    """predictor.json. Only fingerprint and median are read from `about`."""

    schema: one_of(SCHEMA)
    kind: one_of(*PROXIES)
    task: LengthTask
    model: Plain
    calibration: Calibration
    about: Plain


def load_predictor(folder: Path) -> Predictor:
    """Reads what `save` wrote and tries it on a few prompts, because weights of another predictor would load without an
    error and fail later. `UserError`: another folder, or a predictor that does not work."""
    file, remedy = folder / FILE_NAME, "give a folder that `lengths train` wrote"
    where = f"predictor {file}"
    record = validate(_PredictorFile, read_json(file, "predictor", remedy), where, remedy)
    validate(Amount, record.about.get("median_tokens"), f"{where}: about.median_tokens", remedy)
    validate(Label, record.about.get("fingerprint"), f"{where}: about.fingerprint", remedy)
    check_files(folder, "Predictor file", remedy)
    try:
        record.task.check()
        record.calibration.check(record.task)
        model = _model_class(record.kind).load(folder, record.model)
        predictor = Predictor(record.task, model, record.calibration, record.about)
        _try(predictor)
        return predictor
    except UserError:
        raise
    except Exception as error:  # safetensors, numpy and transformers each raise their own
        reason = make_printable(f"{type(error).__name__}: {error}", 300, keep="")
        raise UserError(f"{folder} holds no predictor that works ({reason}); {remedy}.") from None


def _try(predictor: Predictor) -> None:
    """Predicts for made-up prompts. ValueError if the result is no length."""
    texts = ("", "How long is it?", "word " * 3000)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = predictor.predict([Example(text, None, "", len(text.split())) for text in texts])
    if set(found.bounds) != {name_level(level) for level in predictor.task.quantiles}:
        raise ValueError(f"it bounds {', '.join(found.bounds)} instead of its quantiles")
    for name, values in ({"tokens": found.tokens} | found.bounds).items():
        if values.shape != (len(texts),) or not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"its {name} for {len(texts)} prompts are {values.tolist()}")


def train(
    dataset: Dataset, task: LengthTaskConfig, proxy: ProxyConfig, data: LengthDataConfig, progress: Path | None = None
) -> Predictor:
    """Fits thresholds and weights on the training split, and the calibration on the validation split. An encoder saves
    each epoch in the folder `progress`, so that a killed training resumes."""
    started = time.perf_counter()
    fitted = LengthTask.fit(task, collect_lengths(dataset.train))
    if proxy.kind == "encoder":
        limits = {"truncation": data.truncation, "max_tokens": data.max_tokens}
        model = _model_class("encoder").fit(fitted, dataset.train, dataset.models, limits, proxy, data.seed, progress)
    else:
        _model_class(proxy.kind)
        if proxy.features < 2:
            raise UserError(f"proxy.features is {proxy.features} but must be at least 2.")
        features = Features(proxy.features, data.truncation, data.max_tokens, dataset.models)
        model = NgramModel.fit(fitted, dataset.train, dataset.validation, features, proxy, data.seed)
    scores = model.scores(hide_lengths(dataset.validation))
    calibration = Calibration.fit(fitted, scores, collect_lengths(dataset.validation))
    about = {
        "fingerprint": fingerprint(dataset.train),
        "examples": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "models": list(dataset.models),
        "median_tokens": float(np.median(collect_lengths(dataset.train))),
        "rounds": data.rounds,
        "train_seconds": time.perf_counter() - started,
    }
    return Predictor(fitted, model, calibration, about)


def evaluate(predictor: Predictor, examples: Sequence[Example]) -> dict[str, float]:
    """All metrics on examples with known lengths. `cpu_seconds_*`: this process's CPU time per prediction, for all
    examples at once and one by one. `mae_of_constant_tokens`: the error of always predicting the training median."""
    true = collect_lengths(examples)
    started = time.process_time()
    found = predictor.predict(examples)
    together = (time.process_time() - started) / len(examples)
    started = time.process_time()
    for example in examples[:_TIMED_ALONE]:
        predictor.predict([example])
    alone = (time.process_time() - started) / min(_TIMED_ALONE, len(examples))
    metrics = {"examples": len(examples)} | measure_regression(true, found.tokens)
    metrics["mae_of_constant_tokens"] = float(np.abs(true - predictor.about["median_tokens"]).mean())
    if found.classes is not None:
        metrics |= measure_classes(predictor.task.labels(true), found.classes)
    metrics |= measure_bounds(true, found.bounds)
    return metrics | {"cpu_seconds_per_prediction": together, "cpu_seconds_per_prediction_alone": alone}


def _model_class(kind: str) -> Any:
    if kind == "ngrams":
        return NgramModel
    if kind == "encoder":
        from ds_llmpq.lengths.encoder import EncoderModel  # torch and transformers take seconds

        return EncoderModel
    raise UserError(f"proxy.kind is {kind!r} but must be one of {', '.join(PROXIES)}.")
