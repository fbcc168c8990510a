"""The workload a plan is made for, where the user left it open: measured on the input file."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from ds_llmpq.batch.prompts import prepare
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.schema import BatchConfig, ModelConfig, WorkloadConfig

DEFAULT = WorkloadConfig(sequences=32, prompt_tokens=512, generated_tokens=100)
_LOOKED_AT = 2000  # requests; a longer file is taken to go on like its beginning


def sized_workload(
    workload: WorkloadConfig, model: ModelConfig, path: str | None, batch: BatchConfig, shape: ModelShape
) -> WorkloadConfig:
    """`workload` with its open numbers filled in: from the first requests of the input file (their number, the longest
    prompt, the longest answer they allow), or the defaults where there is no input or no tokenizer."""
    fields = ("sequences", "prompt_tokens", "generated_tokens")
    open_fields = [name for name in fields if getattr(workload, name) is None]
    if not open_fields:
        return workload
    measured = _measured(path, model, batch, shape) if path and model.path else DEFAULT
    filled = replace(workload, **{name: getattr(measured, name) for name in open_fields})
    return _within(filled, open_fields, shape)


def _measured(path: str, model: ModelConfig, batch: BatchConfig, shape: ModelShape) -> WorkloadConfig:
    file = read_requests(path, replace(batch, limit=min(batch.limit or _LOOKED_AT, _LOOKED_AT)))
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    prepared, _ = prepare(
        islice(file.requests, _LOOKED_AT),
        tokenizer,
        context_tokens=shape.max_positions or 1 << 20,
        vocabulary_size=shape.vocab,
    )
    if not prepared:
        return DEFAULT  # every row is an error row, which needs no plan in particular
    return WorkloadConfig(
        sequences=min(len(prepared), DEFAULT.sequences),
        prompt_tokens=max(request.prompt_tokens for request in prepared),
        generated_tokens=max(request.max_tokens for request in prepared),
    )


def _within(workload: WorkloadConfig, open_fields: list[str], shape: ModelShape) -> WorkloadConfig:
    """Open lengths are cut to the model's positions; lengths the user gave are left to be refused."""
    limit = shape.max_positions
    if limit is None or workload.prompt_tokens + workload.generated_tokens <= limit:
        return workload
    if "generated_tokens" in open_fields and workload.prompt_tokens < limit:
        return replace(workload, generated_tokens=limit - workload.prompt_tokens)
    if "prompt_tokens" in open_fields and workload.generated_tokens < limit:
        return replace(workload, prompt_tokens=limit - workload.generated_tokens)
    return workload
