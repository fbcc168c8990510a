"""Mixtral: Mistral whose MLP is a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ds_llmpq.models.families import llama
from ds_llmpq.models.family import Epsilon, Experts, Family, Positive
from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec


@dataclass(frozen=True, kw_only=True)
class _MixtralKeys(llama.WindowedKeys):
    num_key_value_heads: Positive | None = 8
    max_position_embeddings: Positive = 131072
    rms_norm_eps: Epsilon = 1e-5
    num_local_experts: Experts = 8
    num_experts_per_tok: Experts = 2
    default_theta: ClassVar[float] = 1_000_000.0


def _build(keys: _MixtralKeys) -> DecoderSpec:
    experts = ExpertsSpec(keys.num_local_experts, keys.num_experts_per_tok, True, llama.mlp(keys))
    return llama.decoder(keys, layers=llama.layers(keys, experts))


_NAMES = (*llama.NAMES, ("mlp.", "block_sparse_moe."), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
FAMILIES = {
    "mixtral": Family(
        _MixtralKeys, _build, "model.layers", llama.ENDS, _NAMES, {"num_experts": "num_local_experts"}, eos_token_id=2
    )
}
