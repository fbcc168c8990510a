"""Mistral: Llama without biases, with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.models.families import llama
from ds_llmpq.models.family import Family, Positive


@dataclass(frozen=True, kw_only=True)
class _MistralKeys(llama.WindowedKeys):
    num_key_value_heads: Positive | None = 8
    max_position_embeddings: Positive = 131072
    sliding_window: Positive | None = 4096


FAMILIES = {"mistral": Family(_MistralKeys, llama.decoder, "model.layers", llama.ENDS, llama.NAMES, eos_token_id=2)}
