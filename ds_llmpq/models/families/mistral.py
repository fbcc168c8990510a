"""Mistral: Llama without biases, with a sliding window."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.families import llama
from ds_llmpq.models.spec import DecoderSpec


def _mistral(config: PreTrainedConfig) -> DecoderSpec:
    return llama.decoder(config, attention=llama.attention(config, qkv_bias=False, output_bias=False))


FAMILIES = {"mistral": Family(_mistral, "model.layers", llama.ENDS, llama.NAMES)}
