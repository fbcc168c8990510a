"""Makes the jobs of a simulation as configured: lengths, predictions, arrivals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json_lines
from ds_llmpq.lengths.records import Tokens
from ds_llmpq.research.arrivals import draw_arrival_times, read_trace
from ds_llmpq.research.config import AnswersConfig, ArrivalsConfig, PredictionConfig, SimulateConfig
from ds_llmpq.scheduler.execution import ExecutionCost, estimate_alone
from ds_llmpq.scheduler.jobs import Jobs
from ds_llmpq.validation import Amount, validate

ANSWERS = ("lognormal", "data", "trace")
PREDICTIONS = ("oracle", "noisy", "classes", "constant", "data")


@dataclass(frozen=True)
class Lengths:
    """Lengths by job; `predicted_tokens` if the source has predictions, `classes` if classes are predicted."""

    generated_tokens: np.ndarray
    prompt_tokens: np.ndarray
    predicted_tokens: np.ndarray | None = None
    classes: np.ndarray | None = None


def make_jobs(settings: SimulateConfig, cost: ExecutionCost, seed: int) -> tuple[Jobs, Lengths]:
    """The jobs of one repeat, and their lengths in the same order. `UserError`: invalid settings."""
    generator = np.random.default_rng(seed)
    arrivals, lengths = settings.arrivals, _draw_lengths(settings, generator)
    lengths = add_predictions(lengths, settings.prediction, generator)
    if arrivals.kind == "trace":
        times = _trace(arrivals, settings.jobs).arrival_seconds
    else:
        rate = arrivals.rate if arrivals.load is None else compute_rate(settings, cost, lengths)
        times = draw_arrival_times(arrivals.kind, settings.jobs, rate, arrivals.cv, generator)
    if len(times) != len(lengths.generated_tokens):
        raise UserError(
            f"arrivals.trace has {len(times)} rows from arrivals.start_row on, fewer than {settings.jobs} jobs."
        )
    jobs = Jobs.from_arrays(times, lengths.generated_tokens, lengths.prompt_tokens, lengths.predicted_tokens)
    return jobs, lengths


def compute_rate(settings: SimulateConfig, cost: ExecutionCost, lengths: Lengths) -> float:
    """Jobs a second for `arrivals.load`, a share of what the slots could do if none were ever padded or empty."""
    if not settings.arrivals.load > 0:
        raise UserError(f"arrivals.load is {settings.arrivals.load} but must be above 0.")
    slots = 1 if settings.batching == "none" else settings.max_batch
    pairs = zip(lengths.prompt_tokens.tolist(), lengths.generated_tokens.tolist(), strict=True)
    return settings.arrivals.load * slots / float(np.mean([estimate_alone(cost, *pair) for pair in pairs]))


def add_predictions(lengths: Lengths, config: PredictionConfig, generator: np.random.Generator) -> Lengths:
    """`lengths` with predictions. `noisy`: the length times log-normal noise. `classes`: the mean length of the class
    that the noisy length falls into. `constant`: the mean."""
    true = lengths.generated_tokens.astype(float)
    if config.kind == "data":
        if lengths.predicted_tokens is None:
            raise UserError("prediction.kind=data needs predicted_tokens in answers.data; give answers.kind=data.")
        return lengths
    noisy = true * generator.lognormal(0, config.sigma, len(true))
    if config.kind == "classes":
        guess, classes = predict_classes(true, noisy, config.percentiles)
        return Lengths(lengths.generated_tokens, lengths.prompt_tokens, guess, classes)
    guesses = {"oracle": true, "noisy": noisy, "constant": np.full(len(true), true.mean())}
    if config.kind not in guesses:
        raise UserError(f"prediction.kind is {config.kind!r} but must be one of {', '.join(PREDICTIONS)}.")
    return Lengths(lengths.generated_tokens, lengths.prompt_tokens, guesses[config.kind])


def predict_classes(true: np.ndarray, noisy: np.ndarray, percentiles: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, class) by job. Classes are as frequent among predictions as among lengths. A class is decoded to the
    mean length of the jobs that are predicted to be in it, which a predictor would know from its training data."""
    if (
        not percentiles
        or sorted(set(percentiles)) != list(percentiles)
        or not 0 < percentiles[0] <= percentiles[-1] < 100
    ):
        raise UserError(f"prediction.percentiles is {percentiles} but must rise from above 0 to below 100.")
    classes = np.digitize(noisy, np.percentile(noisy, percentiles), right=True)
    means = {label: true[classes == label].mean() for label in np.unique(classes).tolist()}
    return np.array([means[label] for label in classes.tolist()]), classes


def _draw_lengths(settings: SimulateConfig, generator: np.random.Generator) -> Lengths:
    answers, count = settings.answers, settings.jobs
    if count < 1:
        raise UserError(f"jobs is {count} but must be at least 1.")
    if answers.kind == "trace":
        trace = _trace(settings.arrivals, count)
        return Lengths(trace.generated_tokens, trace.prompt_tokens)
    if answers.kind == "data":
        return _resample(_read(answers), count, generator)
    if answers.kind != "lognormal":
        raise UserError(f"answers.kind is {answers.kind!r} but must be one of {', '.join(ANSWERS)}.")
    if not answers.median_tokens >= 1 or not answers.max_tokens >= 1 or not answers.sigma >= 0:
        raise UserError("answers.median_tokens and answers.max_tokens must be at least 1, answers.sigma at least 0.")
    generated = generator.lognormal(np.log(answers.median_tokens), answers.sigma, count)
    prompts = generator.lognormal(np.log(answers.prompt_median_tokens), answers.prompt_sigma, count)
    return Lengths(np.clip(generated, 1, answers.max_tokens).astype(np.int64), np.maximum(prompts, 1).astype(np.int64))


def _trace(arrivals: ArrivalsConfig, count: int):
    if arrivals.trace is None:
        raise UserError("Nothing is known of the trace; give arrivals.trace=FILE.")
    return read_trace(Path(arrivals.trace).expanduser(), arrivals.start_row, count, arrivals.scale)


@dataclass(frozen=True)
class _Answered:
    """The keys that are read from a row of a file of answers."""

    output_tokens: Tokens
    prompt_tokens: Tokens | None = 0
    predicted_tokens: Amount | None = None


def _read(answers: AnswersConfig) -> Lengths:
    if answers.data is None:
        raise UserError("answers.kind=data needs answers.data=FILE, JSON lines with output_tokens.")
    file, what, remedy = Path(answers.data).expanduser(), "answers.data", "rows need output_tokens"
    rows: list[_Answered] = []
    for number, row in read_json_lines(file, what, remedy):
        rows.append(validate(_Answered, row, f"{what} {file} line {number}", remedy, ignore_unknown=True))
    generated = np.array([row.output_tokens for row in rows], dtype=np.int64)
    prompts = np.array([row.prompt_tokens or 0 for row in rows], dtype=np.int64)
    guesses = [row.predicted_tokens for row in rows]
    guesses = None if None in guesses or not rows else np.array(guesses, dtype=float)
    if not rows:
        raise UserError(f"answers.data={answers.data} is empty; give rows with output_tokens.")
    return Lengths(np.maximum(generated, 1), prompts, guesses)


def _resample(lengths: Lengths, count: int, generator: np.random.Generator) -> Lengths:
    """Draws `count` jobs, with replacement only if there are too few."""
    available = len(lengths.generated_tokens)
    pick = generator.choice(available, count, replace=count > available)
    guesses = None if lengths.predicted_tokens is None else lengths.predicted_tokens[pick]
    return Lengths(lengths.generated_tokens[pick], lengths.prompt_tokens[pick], guesses)
