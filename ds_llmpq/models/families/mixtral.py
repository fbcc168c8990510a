"""Mixtral: Mistral whose MLP is a mixture of experts."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.families import llama
from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec, LayerSpec


def _mixtral(config: PreTrainedConfig) -> DecoderSpec:
    experts = ExpertsSpec(config.num_local_experts, config.num_experts_per_tok, True, llama.mlp(config))
    layers = [LayerSpec(experts, llama.window(config, index), "rotary") for index in range(config.num_hidden_layers)]
    attention = llama.attention(config, qkv_bias=False, output_bias=False)
    return llama.decoder(config, attention=attention, layers=tuple(layers))


_NAMES = (
    *llama.NAMES,
    ("mlp.", "block_sparse_moe."),
    ("gate_proj", "w1"),
    ("down_proj", "w2"),
    ("up_proj", "w3"),
)
FAMILIES = {"mixtral": Family(_mixtral, "model.layers", llama.ENDS, _NAMES)}
