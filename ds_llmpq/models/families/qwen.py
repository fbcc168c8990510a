"""Qwen2, Qwen3 and Qwen3-MoE: Llama with windows on some layers. Qwen2 has biases on queries, keys and values; Qwen3
norms queries and keys; Qwen3-MoE has, on some or all layers, a mixture of many small experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Le, MaxLen

from ds_llmpq.models.families import llama
from ds_llmpq.models.family import FULL, SLIDING, Experts, Family, LayerTypes, Positive
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, ExpertsSpec, LayerSpec, NormSpec
from ds_llmpq.validation import Count


@dataclass(frozen=True, kw_only=True)
class _QwenKeys(llama.Keys):
    """max_window_layers: the first layer with a window, if there are no `layer_types`."""

    num_key_value_heads: Positive | None = 32
    max_position_embeddings: Positive = 32768
    use_sliding_window: bool = False
    sliding_window: Positive | None = 4096
    max_window_layers: Count = 28
    layer_types: LayerTypes | None = None

    def windows(self) -> list[int | None]:
        layers, window = self.num_hidden_layers, self.sliding_window if self.use_sliding_window else None
        types = self.layer_types
        if types is None:
            types = [SLIDING if index >= self.max_window_layers else FULL for index in range(layers)]
        return llama.assign_windows(types, window, layers)


@dataclass(frozen=True, kw_only=True)
class _NormedKeys(_QwenKeys):
    head_dim: Positive = 128
    attention_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class _MoeKeys(_NormedKeys):
    """Layer `i` has experts if `decoder_sparse_step` divides i + 1 and it is not in `mlp_only_layers`."""

    num_key_value_heads: Positive | None = 4
    head_dim: Positive | None = None
    moe_intermediate_size: Positive = 768
    num_experts: Annotated[int, Ge(0), Le(10_000)] = 128
    num_experts_per_tok: Experts = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: Positive = 1
    mlp_only_layers: Annotated[tuple[Count, ...], MaxLen(10_000)] | None = None

    def windows(self) -> list[int | None]:
        return [self.sliding_window if self.use_sliding_window else None] * self.num_hidden_layers


def _normed_attention(keys: _NormedKeys) -> AttentionSpec:
    """With norms over the features of each query and key."""
    norm, biased = NormSpec("rms", keys.rms_norm_eps), keys.attention_bias
    return llama.attention(keys, qk_norm=norm, qkv_bias=biased, output_bias=biased)


def _build_qwen2(keys: _QwenKeys) -> DecoderSpec:
    return llama.decoder(keys, attention=llama.attention(keys, qkv_bias=True))


def _build_qwen3(keys: _NormedKeys) -> DecoderSpec:
    return llama.decoder(keys, attention=_normed_attention(keys))


def _build_qwen3_moe(keys: _MoeKeys) -> DecoderSpec:
    dense = llama.mlp(keys)
    small = replace(dense, intermediate=keys.moe_intermediate_size)
    layers = []
    for index, window in enumerate(keys.windows()):
        sparse = (index + 1) % keys.decoder_sparse_step == 0 and keys.num_experts > 0
        mlp = dense
        if sparse and index not in (keys.mlp_only_layers or ()):
            mlp = ExpertsSpec(keys.num_experts, keys.num_experts_per_tok, keys.norm_topk_prob, small)
        layers.append(LayerSpec(mlp, window, "rotary"))
    return llama.decoder(keys, attention=_normed_attention(keys), layers=tuple(layers))


_PLACES = ("model.layers", llama.ENDS, llama.NAMES)
FAMILIES = {
    "qwen2": Family(_QwenKeys, _build_qwen2, *_PLACES),
    "qwen3": Family(_NormedKeys, _build_qwen3, *_PLACES),
    "qwen3_moe": Family(_MoeKeys, _build_qwen3_moe, *_PLACES, {"num_local_experts": "num_experts"}),
}
