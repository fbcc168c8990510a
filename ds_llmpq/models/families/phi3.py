"""Phi-3: Mistral with one linear for queries, keys and values and one for gate and up; part of a head may be rotated,
and long sequences by other angles."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.families import llama
from ds_llmpq.models.spec import DecoderSpec


def _phi3(config: PreTrainedConfig) -> DecoderSpec:
    attention = llama.attention(config, qkv="stacked", qkv_bias=False, output_bias=False)
    return llama.decoder(config, attention=attention, layers=llama.layers(config, stacked=True))


FAMILIES = {"phi3": Family(_phi3, "model.layers", llama.ENDS, llama.NAMES)}
