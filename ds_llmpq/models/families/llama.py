"""Llama: rotary positions, RMS norms before each half, grouped key/value heads, gated MLP. Others derive from it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.rotary import rotary_spec
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec

ENDS = {
    "embed_tokens": "model.embed_tokens",
    "head.norm": "model.norm",
    "lm_head": "lm_head",
}
NAMES = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))


def head_size(config: PreTrainedConfig) -> int:
    """Features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window(config: PreTrainedConfig, index: int) -> int | None:
    """Sliding window of decoder layer `index`: by layer type where the configuration has them, else for all layers."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def attention(config: PreTrainedConfig, **changes: Any) -> AttentionSpec:
    size = head_size(config)
    biased = bool(getattr(config, "attention_bias", False))
    usual = {"scale": size**-0.5, "qkv_bias": biased, "output_bias": biased}
    return AttentionSpec(config.num_attention_heads, config.num_key_value_heads, size, **usual | changes)


def mlp(config: PreTrainedConfig, intermediate: int | None = None, **changes: Any) -> MLPSpec:
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    return MLPSpec(intermediate or config.intermediate_size, activation, **changes)


def decoder(config: PreTrainedConfig, **changes: Any) -> DecoderSpec:
    """`changes`: fields of the specification in which a family differs."""
    norm = changes.get("norm") or NormSpec("rms", config.rms_norm_eps)
    usual = {"norm": norm, "final_norm": norm, "attention": attention(config), "tied": config.tie_word_embeddings}
    if "layers" not in changes:
        usual["layers"] = layers(config)
    if "rotary" not in changes:
        usual["rotary"] = (("rotary", rotary_spec(config, head_size(config))),)
    return DecoderSpec(config.hidden_size, config.vocab_size, **usual | changes)


def layers(config: PreTrainedConfig, windowed: bool = True, **mlp_changes: Any) -> tuple[LayerSpec, ...]:
    """All alike, but for their windows."""
    windows = [window(config, index) if windowed else None for index in range(config.num_hidden_layers)]
    return tuple(LayerSpec(mlp(config, **mlp_changes), each, "rotary") for each in windows)


def _llama(config: PreTrainedConfig) -> DecoderSpec:
    return decoder(config, layers=layers(config, windowed=False, bias=config.mlp_bias))


FAMILIES = {"llama": Family(_llama, "model.layers", ENDS, NAMES)}
