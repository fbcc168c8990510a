"""Llama: rotary positions, RMS norms before each half, grouped key/value heads, gated MLP. Most families build on
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ds_llmpq.errors import UserError
from ds_llmpq.models.family import (
    CONFIG,
    REMEDY,
    SLIDING,
    AboveZero,
    Activation,
    Epsilon,
    Family,
    Layers,
    LayerTypes,
    Part,
    Positive,
    require_multiple,
)
from ds_llmpq.models.rope_keys import read_rotary
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec, RotarySpec
from ds_llmpq.validation import Plain

ENDS = {"embed_tokens": "model.embed_tokens", "head.norm": "model.norm", "lm_head": "lm_head"}
NAMES = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys that these families share. head_dim defaults to hidden_size / heads, num_key_value_heads to heads."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Layers
    num_attention_heads: Positive
    vocab_size: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    hidden_act: Activation = "silu"
    rms_norm_eps: Epsilon = 1e-6
    max_position_embeddings: Positive = 2048
    tie_word_embeddings: bool = False
    rope_parameters: Plain | None = None
    rope_scaling: Plain | None = None  # its former name
    rope_theta: AboveZero | None = None
    partial_rotary_factor: Part | None = None
    default_theta: ClassVar[float] = 10_000.0

    def __post_init__(self) -> None:
        if self.head_dim is None:
            require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        require_multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.kv_heads)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Features of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def windows(self) -> list[int | None]:
        """Tokens that the attention of each layer looks back, None: all."""
        return [None] * self.num_hidden_layers

    def rotary(self) -> RotarySpec:
        defaults = {"rope_theta": self.rope_theta or self.default_theta}
        defaults["partial_rotary_factor"] = self.partial_rotary_factor
        given = self.rope_scaling or self.rope_parameters
        return read_rotary(given, self.head_size, self.max_position_embeddings, defaults)


@dataclass(frozen=True, kw_only=True)
class WindowedKeys(Keys):
    """All layers have the same window, or none."""

    sliding_window: Positive | None = None

    def windows(self) -> list[int | None]:
        return [self.sliding_window] * self.num_hidden_layers


def assign_windows(layer_types: LayerTypes, window: int | None, layers: int) -> list[int | None]:
    """`UserError` unless each layer has a type."""
    if len(layer_types) != layers:
        raise UserError(f"{CONFIG} has {len(layer_types)} layer_types for num_hidden_layers={layers}; {REMEDY}.")
    return [window if kind == SLIDING else None for kind in layer_types]


def attention(keys: Keys, **changes: Any) -> AttentionSpec:
    size = keys.head_size
    return AttentionSpec(keys.num_attention_heads, keys.kv_heads, size, **{"scale": size**-0.5} | changes)


def mlp(keys: Keys, **changes: Any) -> MLPSpec:
    return MLPSpec(keys.intermediate_size, keys.hidden_act, **changes)


def decoder(keys: Keys, **changes: Any) -> DecoderSpec:
    """`changes`: fields of the spec in which a family differs."""
    norm = changes.get("norm") or NormSpec("rms", keys.rms_norm_eps)
    usual = {"norm": norm, "final_norm": norm, "max_positions": keys.max_position_embeddings}
    usual |= {"tied": keys.tie_word_embeddings}
    if "attention" not in changes:
        usual["attention"] = attention(keys)
    if "layers" not in changes:
        usual["layers"] = layers(keys, mlp(keys))
    if "rotary" not in changes:
        usual["rotary"] = (("rotary", keys.rotary()),)
    return DecoderSpec(keys.hidden_size, keys.vocab_size, **usual | changes)


def layers(keys: Keys, of: Any) -> tuple[LayerSpec, ...]:
    """Layers that differ only in their windows. of: an MLP or a mixture of experts."""
    return tuple(LayerSpec(of, window, "rotary") for window in keys.windows())


@dataclass(frozen=True, kw_only=True)
class _LlamaKeys(Keys):
    attention_bias: bool = False
    mlp_bias: bool = False


def _build_llama(keys: _LlamaKeys) -> DecoderSpec:
    biased = keys.attention_bias
    return decoder(
        keys,
        attention=attention(keys, qkv_bias=biased, output_bias=biased),
        layers=layers(keys, mlp(keys, bias=keys.mlp_bias)),
    )


FAMILIES = {"llama": Family(_LlamaKeys, _build_llama, "model.layers", ENDS, NAMES, eos_token_id=2)}
