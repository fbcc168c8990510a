"""Sizes the workload of a plan, as far as the user left it open, from the input file and a predictor, if there is one.

A plan has one n, for its cache (B * (s + n) positions, with a shared prefix held once, which is all that the engine
ever allocates) and for its times. Without a predictor, n is the longest limit, so that every request fits in a slot.
With one, n is what the requests' reserves need beside the prompt: the admission's quantile of them if slots are
refilled, else the expected longest of a group; but at least the expected length of the answers. Longer requests run in
fewer, longer slots of the same cache.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.prompts import PreparedRequest, prepare
from ds_llmpq.batch.reader import RequestFile, read_requests, refuse_unservable
from ds_llmpq.integers import round_up
from ds_llmpq.lengths.characterize import estimate_maximum
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.scheduler.prefix import count_shared, find_shared_prefix
from ds_llmpq.serving.job import validate_batch
from ds_llmpq.serving.ordering import predict_answers

DEFAULT = WorkloadConfig(sequences=32, prompt_tokens=512, generated_tokens=100, shared_tokens=0)
_LOOKED_AT = 2000  # requests; the rest of a longer file is assumed to be alike
_FITTING = {"worst_case": 1.0, "q95": 0.95, "q90": 0.9}  # share of the requests that fit in a planned slot


def size_workload(
    workload: WorkloadConfig,
    model: ModelConfig,
    path: str | None,
    batch: BatchConfig,
    shape: ModelShape,
    refill: bool = True,
    share: bool = False,
    block: int = 0,
) -> WorkloadConfig:
    """`workload` with its open numbers filled in from the first requests of the input file: how many there are, the
    longest prompt, the longest answer that they allow (or, with `batch.predictor`, expect), their common prefix, and
    the share that draws its tokens, which is counted even where all else is given. Without an input or a tokenizer, the
    defaults. `refill`: whether the engine refills slots. `share`: whether it computes a shared prefix once. `block`:
    positions of the cache blocks that sequences share; 0: they share none.
    `UserError`: the predictor is not usable."""
    file = _read_first(path, batch) if path else None
    if workload.drawn_share is None:
        workload = replace(workload, drawn_share=_count_drawn(file) if file else 0.0)
    fields = ("sequences", "prompt_tokens", "generated_tokens")
    open_fields = [name for name in fields if getattr(workload, name) is None]
    if not open_fields:
        return _fill_pool(workload, block)
    measured = (
        _measure(file, model, batch, shape, workload.sequences, refill, block) if file and model.path else DEFAULT
    )
    if workload.pool_positions is None:
        open_fields.append("pool_positions")
    if workload.shared_tokens is None:
        if not share:
            measured = replace(measured, shared_tokens=0, unshared_tokens=None)
        open_fields.append("shared_tokens")
        if workload.unshared_tokens is None:
            open_fields.append("unshared_tokens")
    filled = _cut_to_model(
        replace(workload, **{name: getattr(measured, name) for name in open_fields}), open_fields, shape
    )
    if "shared_tokens" in open_fields and filled.shared_tokens >= filled.prompt_tokens:
        # the user gave shorter prompts than there are
        filled = replace(filled, shared_tokens=0, unshared_tokens=None)
    return _fill_pool(filled, block)


def _fill_pool(workload: WorkloadConfig, block: int) -> WorkloadConfig:
    """Of a pool that nothing says the size of, enough for the longest of each sequence."""
    if not block or workload.pool_positions is not None:
        return workload
    length = workload.prompt_tokens + workload.generated_tokens
    return replace(workload, pool_positions=workload.sequences * round_up(length, block))


def _read_first(path: str, batch: BatchConfig) -> RequestFile:
    """The first requests of the input."""
    file = read_requests(path, replace(batch, limit=min(batch.limit or _LOOKED_AT, _LOOKED_AT)))
    if file.total < _LOOKED_AT:
        refuse_unservable(file, path)
    return file


def _count_drawn(file: RequestFile) -> float:
    """The share of the requests whose tokens are drawn."""
    return sum(request.params.temperature > 0 for request in file.requests) / max(1, len(file.requests))


def _measure(
    file: RequestFile,
    model: ModelConfig,
    batch: BatchConfig,
    shape: ModelShape,
    sequences: int | None,
    refill: bool,
    block: int,
) -> WorkloadConfig:
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    prepared, _ = prepare(
        islice(file.requests, _LOOKED_AT),
        tokenizer,
        context_tokens=shape.max_positions or 1 << 20,
        vocabulary_size=shape.vocab,
    )
    if not prepared:
        return DEFAULT  # every row is an error row, for which any plan will do
    prompt_tokens = max(request.prompt_tokens for request in prepared)
    sequences = sequences or min(len(prepared), DEFAULT.sequences)
    if batch.predictor is None:
        generated_tokens = max(request.max_tokens for request in prepared)
    else:
        generated_tokens = _predict_tokens(prepared, validate_batch(batch), model, prompt_tokens, sequences, refill)
    prefix = array("i", find_shared_prefix([request.prompt_ids for request in prepared], prompt_tokens))
    others = [request.sequence_tokens for request in prepared if not count_shared(request.prompt_ids, prefix)]
    unshared = max(others, default=0) if prefix else None
    pool = _count_pool(prepared, prefix, batch, model, sequences, block) if block else None
    return WorkloadConfig(sequences, prompt_tokens, generated_tokens, len(prefix), unshared, pool)


def _count_pool(
    prepared: list[PreparedRequest],
    prefix: array,
    batch: BatchConfig,
    model: ModelConfig,
    sequences: int,
    block: int,
) -> int:
    """Positions for `sequences` requests of the mean length, with the whole answer that each allows, or that the
    predictor expects. Few are that long at the same time, so this leaves room for a run of long ones."""
    answers = predict_answers(prepared, validate_batch(batch), Path(model.path).name).tokens
    needs = [
        round_up(each.prompt_tokens - count_shared(each.prompt_ids, prefix) // block * block + ceil(answer), block)
        for each, answer in zip(prepared, answers, strict=True)
    ]
    return max(*needs, block * ceil(sequences * sum(needs) / len(needs) / block))


def _predict_tokens(
    prepared: list[PreparedRequest],
    batch: BatchConfig,
    model: ModelConfig,
    prompt_tokens: int,
    sequences: int,
    refill: bool,
) -> int:
    """n, from the predicted lengths of the answers."""
    predicted = predict_answers(prepared, batch, Path(model.path).name)
    reserves = np.array([each.prompt_tokens for each in prepared]) + predicted.bounds
    answers = np.array(predicted.tokens)
    if refill:
        capacity, length = np.quantile(reserves, _FITTING[batch.admission], method="higher"), answers.mean()
    else:
        capacity, length = estimate_maximum(reserves, sequences), estimate_maximum(answers, sequences)
    return max(1, ceil(length), ceil(capacity) - prompt_tokens)


def _cut_to_model(workload: WorkloadConfig, open_fields: list[str], shape: ModelShape) -> WorkloadConfig:
    """Cuts open lengths to the model's positions. Lengths that the user gave stay, and are refused later."""
    limit = shape.max_positions
    if limit is None or workload.prompt_tokens + workload.generated_tokens <= limit:
        return workload
    if "generated_tokens" in open_fields and workload.prompt_tokens < limit:
        return replace(workload, generated_tokens=limit - workload.prompt_tokens)
    if "prompt_tokens" in open_fields and workload.generated_tokens < limit:
        return replace(workload, prompt_tokens=limit - workload.generated_tokens)
    return workload
