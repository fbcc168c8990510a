"""Gemma 2 and Gemma 3 (text): norms around each half, weights of norms less one, a scaled embedding, windows on most
layers. Gemma 2 bends scores and logits; Gemma 3 norms queries and keys, and turns windowed layers by other angles."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ds_llmpq.errors import UserError
from ds_llmpq.models.decoder import Family
from ds_llmpq.models.families import llama
from ds_llmpq.models.rotary import rotary_spec
from ds_llmpq.models.spec import DecoderSpec, LayerSpec, NormSpec


def _gemma(config: PreTrainedConfig, rotary: dict[str, Any], attention: dict[str, Any]) -> DecoderSpec:
    """rotary: parameters by the name under which layers ask for them, which is their type, or all ask for one."""
    if config.use_bidirectional_attention:
        raise UserError("config.json has use_bidirectional_attention=true; only causal attention is supported.")
    norm = NormSpec("rms", config.rms_norm_eps, plus_one=True)
    mlp = llama.mlp(config)
    layers = tuple(
        LayerSpec(mlp, llama.window(config, index), kind if kind in rotary else "rotary")
        for index, kind in enumerate(config.layer_types)
    )
    size = llama.head_size(config)
    return llama.decoder(
        config,
        norm=norm,
        norms="around",
        attention=llama.attention(config, scale=config.query_pre_attn_scalar**-0.5, **attention),
        layers=layers,
        rotary=tuple((name, rotary_spec(config, size, parameters)) for name, parameters in rotary.items()),
        embedding_scale=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
    )


def _gemma2(config: PreTrainedConfig) -> DecoderSpec:
    return _gemma(config, {"rotary": config.rope_parameters}, {"soft_cap": config.attn_logit_softcapping})


def _gemma3(config: PreTrainedConfig) -> DecoderSpec:
    norm = NormSpec("rms", config.rms_norm_eps, plus_one=True)
    kinds = set(config.layer_types)
    return _gemma(config, {kind: config.rope_parameters[kind] for kind in sorted(kinds)}, {"qk_norm": norm})


_NAMES = (
    ("attention_norm", "input_layernorm"),
    ("attention_out_norm", "post_attention_layernorm"),
    ("mlp_norm", "pre_feedforward_layernorm"),
    ("mlp_out_norm", "post_feedforward_layernorm"),
)
FAMILIES = {
    "gemma2": Family(_gemma2, "model.layers", llama.ENDS, _NAMES),
    "gemma3_text": Family(_gemma3, "model.layers", llama.ENDS, _NAMES),
}
