"""Gemma 2 and Gemma 3 (text): norms around each half, norm weights stored less one, a scaled embedding, windows on most
layers. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and has other angles for windowed layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.models.families import llama
from ds_llmpq.models.family import CONFIG, FULL, REMEDY, SLIDING, AboveZero, Activation, Family, LayerTypes, Positive
from ds_llmpq.models.rope_keys import read_rotary
from ds_llmpq.models.spec import DecoderSpec, LayerSpec, NormSpec


@dataclass(frozen=True, kw_only=True)
class _GemmaKeys(llama.Keys):
    num_key_value_heads: Positive | None = 4
    head_dim: Positive = 256
    hidden_act: Activation = "gelu_pytorch_tanh"
    max_position_embeddings: Positive = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: AboveZero = 256
    sliding_window: Positive | None = 4096
    layer_types: LayerTypes | None = None
    final_logit_softcapping: AboveZero | None = 30.0
    attn_logit_softcapping: AboveZero | None = 50.0
    use_bidirectional_attention: bool | None = False
    sliding_window_pattern: Positive = 2  # the last of so many layers has no window

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_bidirectional_attention:
            raise UserError(f"{CONFIG} has use_bidirectional_attention=true; only causal attention is supported.")

    def types(self) -> tuple[str, ...]:
        """The kind of each layer."""
        pattern = self.sliding_window_pattern
        if self.layer_types is not None:
            return self.layer_types
        return tuple(SLIDING if (index + 1) % pattern else FULL for index in range(self.num_hidden_layers))

    def windows(self) -> list[int | None]:
        return llama.assign_windows(self.types(), self.sliding_window, self.num_hidden_layers)


@dataclass(frozen=True, kw_only=True)
class _Gemma3Keys(_GemmaKeys):
    max_position_embeddings: Positive = 131072
    final_logit_softcapping: AboveZero | None = None
    attn_logit_softcapping: AboveZero | None = None
    sliding_window_pattern: Positive = 6
    rope_local_base_freq: AboveZero | None = None

    def rotary_by_type(self) -> dict[str, Any]:
        """`rope_parameters` has one entry for each type; the former `rope_scaling` is for full attention alone."""
        given = self.rope_parameters or {}
        full = {"rope_theta": self.rope_theta or 1e6} | _plain(given.get(FULL)) | (self.rope_scaling or {})
        sliding = {"rope_theta": self.rope_local_base_freq or 1e4} | _plain(given.get(SLIDING))
        return {FULL: full, SLIDING: sliding}


def _plain(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{CONFIG} has rope_parameters of a kind of layers that are no object; {REMEDY}.")
    return given or {}


def _build(keys: _GemmaKeys, rotary: dict[str, Any], **attention: Any) -> DecoderSpec:
    """rotary: by layer type, or one named `rotary` for all."""
    norm, mlp, biased = NormSpec("rms", keys.rms_norm_eps, plus_one=True), llama.mlp(keys), keys.attention_bias
    layers = [
        LayerSpec(mlp, window, kind if kind in rotary else "rotary")
        for kind, window in zip(keys.types(), keys.windows(), strict=True)
    ]
    scale = keys.query_pre_attn_scalar**-0.5
    return llama.decoder(
        keys,
        norm=norm,
        norms="around",
        attention=llama.attention(keys, scale=scale, qkv_bias=biased, output_bias=biased, **attention),
        layers=tuple(layers),
        rotary=tuple(rotary.items()),
        embedding_scale=keys.hidden_size**0.5,
        logit_cap=keys.final_logit_softcapping,
    )


def _build_gemma2(keys: _GemmaKeys) -> DecoderSpec:
    return _build(keys, {"rotary": keys.rotary()}, soft_cap=keys.attn_logit_softcapping)


def _build_gemma3(keys: _Gemma3Keys) -> DecoderSpec:
    given, kinds = keys.rotary_by_type(), sorted(set(keys.types()))
    positions = keys.max_position_embeddings
    rotary = {kind: read_rotary(given[kind], keys.head_size, positions, {}) for kind in kinds}
    return _build(keys, rotary, qk_norm=NormSpec("rms", keys.rms_norm_eps, plus_one=True))


_NAMES = (
    ("attention_norm", "input_layernorm"),
    ("attention_out_norm", "post_attention_layernorm"),
    ("mlp_norm", "pre_feedforward_layernorm"),
    ("mlp_out_norm", "post_feedforward_layernorm"),
)
_REST = {
    "layers": "model.layers",
    "ends": llama.ENDS,
    "names": _NAMES,
    "aliases": {"hidden_activation": "hidden_act"},
    "eos_token_id": 1,
}
FAMILIES = {
    "gemma2": Family(_GemmaKeys, _build_gemma2, **_REST),
    "gemma3_text": Family(_Gemma3Keys, _build_gemma3, **_REST),
}
