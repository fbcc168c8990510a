"""OPT: learned positions, layer norms before or (350m) after each half, biases, a plain MLP, projections around the
stack where the embedding is narrower."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llmpq.models.decoder import Family
from ds_llmpq.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec

_OFFSET = 2  # rows of the table of positions that no token has


def _opt(config: PreTrainedConfig) -> DecoderSpec:
    heads, biased = config.num_attention_heads, config.enable_bias
    size = config.hidden_size // heads
    norm = NormSpec("layer", 1e-5, affine=config.layer_norm_elementwise_affine)
    before = config.do_layer_norm_before
    mlp = MLPSpec(config.ffn_dim, config.activation_function, gated=False, bias=biased)
    return DecoderSpec(
        config.hidden_size,
        config.vocab_size,
        norm=norm,
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=biased, output_bias=biased),
        layers=(LayerSpec(mlp),) * config.num_hidden_layers,
        norms="before" if before else "after",
        embedding_width=config.word_embed_proj_dim,
        learned_positions=config.max_position_embeddings + _OFFSET,
        position_offset=_OFFSET,
        # checkpoints that norm after each half, and some old ones, have no norm behind the last layer
        final_norm=norm if before and not config._remove_final_layer_norm else None,
        tied=config.tie_word_embeddings,
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
FAMILIES = {"opt": Family(_opt, "model.decoder.layers", _ENDS, _NAMES)}
