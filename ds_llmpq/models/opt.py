"""OPT: learned positions added to the token embedding, layer norms, biases, optional projections around the stack."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTLearnedPositionalEmbedding

from ds_llmpq.models.architecture import Architecture, DecoderLayer, Head, no_positional, output_matrix, tied_or
from ds_llmpq.models.step import Step

_EMBEDDING = "model.decoder.embed_tokens.weight"


def _projected(config: PreTrainedConfig) -> bool:
    return config.word_embed_proj_dim != config.hidden_size


def _final_norm(config: PreTrainedConfig) -> bool:
    # checkpoints that normalise after each block, and some old ones, have no norm after the last layer
    return config.do_layer_norm_before and not config._remove_final_layer_norm


class Embedding(nn.Module):
    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.word_embed_proj_dim)
        self.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, config.hidden_size)
        self.project_in = (
            nn.Linear(config.word_embed_proj_dim, config.hidden_size, bias=False) if _projected(config) else None
        )

    def forward(self, step: Step) -> Step:
        hidden = self.embed_tokens(step.token_ids)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        step.hidden = hidden + self.embed_positions(None, position_ids=step.positions)
        return step


def _head(config: PreTrainedConfig) -> Head:
    norm = nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)
    projection = nn.Linear(config.hidden_size, config.word_embed_proj_dim, bias=False) if _projected(config) else None
    return Head(
        norm if _final_norm(config) else None, output_matrix(config, config.word_embed_proj_dim), project_out=projection
    )


def _embedding_tensors(config: PreTrainedConfig) -> dict[str, str]:
    names = {"embed_tokens.weight": _EMBEDDING, "embed_positions.weight": "model.decoder.embed_positions.weight"}
    if _projected(config):
        names["project_in.weight"] = "model.decoder.project_in.weight"
    return names


def _head_tensors(config: PreTrainedConfig) -> dict[str, str]:
    names = {"lm_head.weight": tied_or(config, _EMBEDDING)}
    if _final_norm(config) and config.layer_norm_elementwise_affine:
        names |= {f"norm.{part}": f"model.decoder.final_layer_norm.{part}" for part in ("weight", "bias")}
    if _projected(config):
        names["project_out.weight"] = "model.decoder.project_out.weight"
    return names


ARCHITECTURES = {
    "opt": Architecture(
        embedding=Embedding,
        layer=lambda config, index: DecoderLayer(OPTDecoderLayer(config, index)),
        head=_head,
        embedding_tensors=_embedding_tensors,
        head_tensors=_head_tensors,
        layer_prefix=lambda index: f"model.decoder.layers.{index}.",
        positional=no_positional,
    )
}
