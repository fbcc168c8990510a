"""In which order requests run: as they came, or neighbours of like length, which need less padding and waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.errors import UserError
from ds_llmpq.lengths.predictor import load_predictor
from ds_llmpq.lengths.records import Example, join_turns
from ds_llmpq.scheduler.policies import POLICIES
from ds_llmpq.scheduler.policies import PREDICTING as REPLAYED_BY_PREDICTION

ORDERINGS = ("arrival", "prompt_length", "predicted_length", "bucketed")
PREDICTING = frozenset({"predicted_length", "bucketed"})
ADMISSIONS = ("worst_case", "q95", "q90")
REPLAYS = (None, "trace")


def validate_batch(batch: BatchConfig) -> BatchConfig:
    """`batch` with its order chosen and its predictor as an absolute path. `UserError`: no such order, admission or
    policy, or a predictor that is missing or of no use."""
    if batch.order is None:
        batch = replace(batch, order="arrival" if batch.replay else "predicted_length")
    for name, known in (("order", ORDERINGS), ("admission", ADMISSIONS), ("policy", POLICIES)):
        if getattr(batch, name) not in known:
            raise UserError(f"batch.{name} is {getattr(batch, name)!r} but must be one of {', '.join(known)}.")
    if batch.replay not in REPLAYS:
        raise UserError(f"batch.replay is {batch.replay!r} but must be trace, or null for none.")
    predicted = batch.admission != "worst_case"
    if batch.replay:
        if batch.order != "arrival":
            raise UserError(f"batch.order={batch.order} is of no use in a replay; give batch.policy instead.")
        if predicted:
            raise UserError(
                f"batch.admission={batch.admission} is of no use in a replay, which reserves each answer's own limit; "
                "leave it at worst_case."
            )
        needs = batch.policy in REPLAYED_BY_PREDICTION
    else:
        needs = predicted or batch.order in PREDICTING
    if batch.predictor is None:
        if predicted or (batch.replay and needs):
            name = f"admission={batch.admission}" if predicted else f"policy={batch.policy}"
            raise UserError(f"batch.{name} needs batch.predictor=FOLDER; train one with `ds-llmpq lengths train`.")
        return batch
    if not needs:
        raise UserError(
            f"batch.predictor is of no use with batch.order={batch.order}; give predicted_length or bucketed, or an "
            "admission or a policy that predicts."
        )
    folder = Path(batch.predictor).expanduser().absolute()
    predictor = load_predictor(folder)
    if predicted and int(batch.admission[1:]) / 100 not in predictor.task.quantiles:
        raise UserError(
            f"batch.admission={batch.admission}, but the predictor in {folder} has bounds for "
            f"{', '.join(f'{level:g}' for level in predictor.task.quantiles) or 'no quantile'}; train it with that one."
        )
    return replace(batch, predictor=str(folder))


def order_requests(
    prepared: Sequence[PreparedRequest], ordering: str = "arrival", answer_tokens: Sequence[float] | None = None
) -> list[int]:
    """Places in `prepared` in the order to run. `arrival` keeps the file's order. `prompt_length` runs the longest
    prompts first, equal ones in file order: what does not fit in memory then shows at the start, and the last, partial
    batch is the cheapest. `predicted_length`: the longest answers first, by `answer_tokens`, one a request (None: each
    request's own limit). `bucketed`: by prompt length in powers of two, and within these by predicted length."""
    places = range(len(prepared))
    if ordering == "arrival":
        return list(places)
    if ordering == "prompt_length":
        return sorted(places, key=lambda place: -prepared[place].prompt_tokens)
    if ordering not in ORDERINGS:
        raise UserError(f"ordering is {ordering!r} but must be one of {', '.join(ORDERINGS)}.")
    expected = answer_tokens if answer_tokens is not None else [each.max_tokens for each in prepared]
    bucketed = ordering == "bucketed"

    def key(place: int) -> tuple[int, float]:
        return (-prepared[place].prompt_tokens.bit_length() if bucketed else 0, -expected[place])

    return sorted(places, key=key)


@dataclass(frozen=True)
class PredictedAnswers:
    """What is predicted of each answer, in tokens: its length, and the bound that cache is reserved
    for, never more than the request allows."""

    tokens: list[float]
    bounds: list[int]


def predict_answers(prepared: list[PreparedRequest], batch: BatchConfig, model: str = "") -> PredictedAnswers:
    """By the predictor; without one just each request's limit. `model`: who answers requests that name no model.

    In a replay the limits do not cut what is predicted: a trace's limits are the lengths its answers had, which a
    policy that predicts must not see.
    """
    limits = [each.max_tokens for each in prepared]
    if batch.predictor is None:
        return PredictedAnswers([float(limit) for limit in limits], limits)
    found = load_predictor(Path(batch.predictor)).predict([_example(each, model) for each in prepared])
    tokens = found.tokens.tolist()
    if batch.replay is None:
        tokens = [min(value, limit) for value, limit in zip(tokens, limits, strict=True)]
    if batch.admission == "worst_case":
        return PredictedAnswers(tokens, limits)
    bounds = found.bounds[batch.admission].tolist()
    return PredictedAnswers(
        tokens, [max(1, min(ceil(value), limit)) for value, limit in zip(bounds, limits, strict=True)]
    )


def _example(prepared: PreparedRequest, model: str) -> Example:
    """A request as the predictor's training data shows it."""
    request = prepared.request
    if isinstance(request.prompt, str):
        text = request.prompt
    elif request.is_chat:
        text = join_turns(request.prompt)
    else:
        text = " ".join(map(str, request.prompt))
    return Example(text, None, request.model or model, prepared.prompt_tokens)
