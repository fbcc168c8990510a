"""BLOOM: ALiBi instead of positions, queries, keys and values from one linear, a norm behind the embedding."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec


def _bloom(config: PreTrainedConfig) -> DecoderSpec:
    heads, size = config.n_head, config.hidden_size // config.n_head
    norm = NormSpec("layer", config.layer_norm_epsilon)
    # summed in slices, as this asks for, transformers leaves out what the sums' biases would add
    biased = not (config.pretraining_tp > 1 and config.slow_but_exact)
    mlp = MLPSpec(4 * config.hidden_size, "gelu_pytorch_tanh", gated=False, bias=True, down_bias=biased)
    return DecoderSpec(
        config.hidden_size,
        config.vocab_size,
        norm=norm,
        attention=AttentionSpec(
            heads, heads, size, size**-0.5, qkv="interleaved", qkv_bias=True, output_bias=biased, alibi=True
        ),
        layers=(LayerSpec(mlp),) * config.n_layer,
        residual_from_norm=config.apply_residual_connection_post_layernorm,
        embedding_norm=norm,
        final_norm=norm,
        tied=config.tie_word_embeddings,
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
FAMILIES = {"bloom": Family(_bloom, "transformer.h", _ENDS, _NAMES)}
