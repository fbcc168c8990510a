"""In which order requests run: as they came, or neighbours of like length, which need less padding and waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.errors import UserError
from ds_llmpq.lengths.predictor import load_predictor
from ds_llmpq.lengths.records import Example, conversation_text
from ds_llmpq.schema import BatchConfig

ORDERINGS = ("arrival", "prompt_length", "predicted_length", "bucketed")
PREDICTING = frozenset({"predicted_length", "bucketed"})


def checked(batch: BatchConfig) -> BatchConfig:
    """`batch` with its predictor as an absolute path. `UserError`: no such order, or no predictor there."""
    if batch.order not in ORDERINGS:
        raise UserError(f"batch.order is {batch.order!r} but must be one of {', '.join(ORDERINGS)}.")
    if batch.predictor is None:
        return batch
    if batch.order not in PREDICTING:
        raise UserError(
            f"batch.predictor is of no use with batch.order={batch.order}; give predicted_length or bucketed."
        )
    folder = Path(batch.predictor).expanduser().absolute()
    load_predictor(folder)
    return replace(batch, predictor=str(folder))


def ordered(
    prepared: list[PreparedRequest], ordering: str = "arrival", answer_tokens: Sequence[float] | None = None
) -> list[PreparedRequest]:
    """`arrival` keeps the file's order. `prompt_length` runs the longest prompts first, equal ones in file order:
    what does not fit in memory then shows at the start, and the last, partial wave is the cheapest.
    `predicted_length`: the longest answers first, by `answer_tokens`, one a request (None: each request's own limit).
    `bucketed`: by prompt length in powers of two, and within these by predicted length."""
    if ordering == "arrival":
        return list(prepared)
    if ordering == "prompt_length":
        return sorted(prepared, key=lambda each: -each.prompt_tokens)
    if ordering not in ORDERINGS:
        raise UserError(f"ordering is {ordering!r} but must be one of {', '.join(ORDERINGS)}.")
    expected = answer_tokens if answer_tokens is not None else [each.max_tokens for each in prepared]
    bucketed = ordering == "bucketed"

    def key(place: int) -> tuple[int, float]:
        return (-prepared[place].prompt_tokens.bit_length() if bucketed else 0, -expected[place])

    return [prepared[place] for place in sorted(range(len(prepared)), key=key)]


def predicted_tokens(prepared: list[PreparedRequest], predictor: str | None, model: str = "") -> list[float]:
    """Predicted tokens of each answer, no more than its request allows; without a predictor just that limit.
    `model`: who answers requests that name no model."""
    limits = [float(each.max_tokens) for each in prepared]
    if predictor is None:
        return limits
    found = load_predictor(Path(predictor)).predict([_example(each, model) for each in prepared]).tokens.tolist()
    return [min(tokens, limit) for tokens, limit in zip(found, limits, strict=True)]


def _example(prepared: PreparedRequest, model: str) -> Example:
    """A request as the predictor's training data shows it."""
    request = prepared.request
    if isinstance(request.prompt, str):
        text = request.prompt
    elif request.is_chat:
        text = conversation_text(request.prompt)
    else:
        text = " ".join(map(str, request.prompt))
    return Example(text, None, request.model or model, prepared.prompt_tokens)


def waves(prepared: list[PreparedRequest], sequences: int, ordering: str = "arrival") -> list[list[PreparedRequest]]:
    """Batches of `sequences` requests (the last may be smaller), each of which runs to its end before the next."""
    if sequences < 1:
        raise UserError(f"sequences is {sequences} but must be at least 1.")
    rows = ordered(prepared, ordering)
    return [rows[start : start + sequences] for start in range(0, len(rows), sequences)]


def padding_share(batches: list[list[PreparedRequest]]) -> float:
    """Share of prefill positions that are padding when each batch is padded to its longest prompt."""
    padded = sum(len(batch) * max(each.prompt_tokens for each in batch) for batch in batches)
    return 1 - sum(each.prompt_tokens for batch in batches for each in batch) / padded if padded else 0.0
