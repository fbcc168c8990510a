"""Bounds of micro-batches, the same in a run and in what is predicted of it. Imports no torch."""

from __future__ import annotations

from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.plan import Plan
from ds_llmpq.scheduler.micro_batch import PATIENCE_ROUNDS, MicroBatchLimits


def build_limits(
    plan: Plan, options: EngineConfig, splits_prompts: bool, ragged: bool, prefix_tokens: int
) -> MicroBatchLimits:
    """As planned. `splits_prompts`: the model's long prompts may pass in chunks. `ragged`: every stage is one graph.
    `prefix_tokens`: of the prefix that is held once."""
    sizes, workload = plan.micro_batch, plan.workload
    tokens = max(sizes.prefill * workload.prefill_tokens, workload.prompt_tokens)
    captures = options.captures(stage.kind for stage in plan.stages)
    patience = options.patience_rounds
    if patience is None:
        patience = 0 if ragged else PATIENCE_ROUNDS
    return MicroBatchLimits(
        prefill_rows=sizes.prefill,
        prefill_tokens=min(tokens, options.prefill_tokens or tokens),
        decode_rows=sizes.decode,
        patience_rounds=patience,
        batch_invariant=options.batch_invariant,
        row_buckets=captures,
        chunked=splits_prompts,
        cache_blocks=plan.count_pool_blocks(prefix_tokens),
        block_tokens=plan.cache_block,
        ragged=ragged and not captures,
    )
