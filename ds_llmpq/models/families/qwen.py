"""Qwen2 and Qwen3: Llama with windows on some layers; Qwen2 has biases on queries, keys and values, Qwen3 norms."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.families import llama
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, NormSpec


def normed_attention(config: PreTrainedConfig) -> AttentionSpec:
    """With norms over each query's and key's features, as in Qwen3."""
    return llama.attention(config, qk_norm=NormSpec("rms", config.rms_norm_eps))


def _qwen2(config: PreTrainedConfig) -> DecoderSpec:
    return llama.decoder(config, attention=llama.attention(config, qkv_bias=True, output_bias=False))


def _qwen3(config: PreTrainedConfig) -> DecoderSpec:
    return llama.decoder(config, attention=normed_attention(config))


FAMILIES = {
    "qwen2": Family(_qwen2, "model.layers", llama.ENDS, llama.NAMES),
    "qwen3": Family(_qwen3, "model.layers", llama.ENDS, llama.NAMES),
}
