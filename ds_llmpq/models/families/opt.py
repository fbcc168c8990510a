"""OPT: learned positions, layer norms before or (350m) after each half, biases, a plain MLP, and projections if the
embedding is narrower."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.models.family import Activation, Family, Layers, Positive, require_multiple
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec

_OFFSET = 2  # unused rows at the start of the position table


@dataclass(frozen=True, kw_only=True)
class _OptKeys:
    hidden_size: Positive
    num_hidden_layers: Layers
    num_attention_heads: Positive
    ffn_dim: Positive
    vocab_size: Positive
    max_position_embeddings: Positive = 2048
    word_embed_proj_dim: Positive | None = None
    activation_function: Activation = "relu"
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)


def _build(keys: _OptKeys) -> DecoderSpec:
    heads, biased = keys.num_attention_heads, keys.enable_bias
    size = keys.hidden_size // heads
    norm = NormSpec("layer", 1e-5, affine=keys.layer_norm_elementwise_affine)
    before = keys.do_layer_norm_before
    mlp = MLPSpec(keys.ffn_dim, keys.activation_function, gated=False, bias=biased)
    return DecoderSpec(
        keys.hidden_size,
        keys.vocab_size,
        norm=norm,
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=biased, output_bias=biased),
        layers=(LayerSpec(mlp),) * keys.num_hidden_layers,
        max_positions=keys.max_position_embeddings,
        norms="before" if before else "after",
        embedding_width=keys.word_embed_proj_dim or 0,
        learned_positions=keys.max_position_embeddings + _OFFSET,
        position_offset=_OFFSET,
        # checkpoints that norm after each half, and some old ones, have no final norm
        final_norm=norm if before and not keys.remove_final_layer_norm else None,
        tied=keys.tie_word_embeddings,
    )


_ENDS = {
    "embed_tokens": "model.decoder.embed_tokens",
    "embed_positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "head.norm": "model.decoder.final_layer_norm",
    "project_out": "model.decoder.project_out",
    "lm_head": "lm_head",
}
_NAMES = (
    ("attention_norm", "self_attn_layer_norm"),
    ("mlp_norm", "final_layer_norm"),
    ("o_proj", "out_proj"),
    ("mlp.up_proj", "fc1"),
    ("mlp.down_proj", "fc2"),
)
_ALIASES = {"_remove_final_layer_norm": "remove_final_layer_norm"}
FAMILIES = {"opt": Family(_OptKeys, _build, "model.decoder.layers", _ENDS, _NAMES, _ALIASES, eos_token_id=2)}
