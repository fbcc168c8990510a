"""BLOOM: ALiBi instead of positions, one linear for queries, keys and values, a norm after the embedding."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.models.family import Epsilon, Family, Layers, Positive, require_multiple
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec


@dataclass(frozen=True, kw_only=True)
class _BloomKeys:
    hidden_size: Positive
    n_layer: Layers
    n_head: Positive
    vocab_size: Positive
    layer_norm_epsilon: Epsilon = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    pretraining_tp: Positive = 1
    slow_but_exact: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_multiple("hidden_size", self.hidden_size, "n_head", self.n_head)


def _build(keys: _BloomKeys) -> DecoderSpec:
    heads, size = keys.n_head, keys.hidden_size // keys.n_head
    norm = NormSpec("layer", keys.layer_norm_epsilon)
    # with these settings transformers sums in slices and omits the biases
    biased = not (keys.pretraining_tp > 1 and keys.slow_but_exact)
    mlp = MLPSpec(4 * keys.hidden_size, "gelu_pytorch_tanh", gated=False, bias=True, down_bias=biased)
    return DecoderSpec(
        keys.hidden_size,
        keys.vocab_size,
        norm=norm,
        attention=AttentionSpec(
            heads, heads, size, size**-0.5, qkv="interleaved", qkv_bias=True, output_bias=biased, alibi=True
        ),
        layers=(LayerSpec(mlp),) * keys.n_layer,
        residual_from_norm=keys.apply_residual_connection_post_layernorm,
        embedding_norm=norm,
        final_norm=norm,
        tied=keys.tie_word_embeddings,
    )


_ENDS = {
    "embed_tokens": "transformer.word_embeddings",
    "embedding.norm": "transformer.word_embeddings_layernorm",
    "head.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
_NAMES = (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("self_attn.qkv_proj", "self_attention.query_key_value"),
    ("self_attn.o_proj", "self_attention.dense"),
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
)
_ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
FAMILIES = {"bloom": Family(_BloomKeys, _build, "transformer.h", _ENDS, _NAMES, _ALIASES, eos_token_id=2)}
