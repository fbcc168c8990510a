"""Qwen3-MoE: Qwen3 whose MLP is, on some layers or all, a mixture of many small experts."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.families import llama
from ds_llmpq.models.families.qwen import normed_attention
from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec, LayerSpec


def _layer(config: PreTrainedConfig, index: int) -> LayerSpec:
    sparse = (index + 1) % config.decoder_sparse_step == 0 and config.num_experts > 0
    mlp = llama.mlp(config)
    if sparse and index not in config.mlp_only_layers:
        small = llama.mlp(config, intermediate=config.moe_intermediate_size)
        mlp = ExpertsSpec(config.num_experts, config.num_experts_per_tok, config.norm_topk_prob, small)
    return LayerSpec(mlp, llama.window(config, index), "rotary")


def _qwen3_moe(config: PreTrainedConfig) -> DecoderSpec:
    layers = tuple(_layer(config, index) for index in range(config.num_hidden_layers))
    return llama.decoder(config, attention=normed_attention(config), layers=layers)


FAMILIES = {"qwen3_moe": Family(_qwen3_moe, "model.layers", llama.ENDS, llama.NAMES)}
