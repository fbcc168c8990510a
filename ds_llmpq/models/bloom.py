"""BLOOM: ALiBi biases instead of positions, fused query-key-value, a norm after the embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.bloom.modeling_bloom import BloomBlock, build_alibi_tensor

from ds_llmpq.models.architecture import Architecture, Head, output_matrix, tied_or
from ds_llmpq.models.step import Step

_EMBEDDING = "transformer.word_embeddings.weight"


class Embedding(nn.Module):
    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, step: Step) -> Step:
        step.hidden = self.norm(self.word_embeddings(step.token_ids))
        return step


class Layer(nn.Module):
    """BLOOM's block computes attention itself and wants an additive mask, also where causality would suffice."""

    def __init__(self, config: PreTrainedConfig, index: int):
        super().__init__()
        self.layer = BloomBlock(config, index)

    def forward(self, step: Step) -> Step:
        inputs = step.prepared()
        step.hidden, _ = self.layer(
            step.hidden, inputs["alibi"], inputs["mask"], layer_past=step.cache, use_cache=step.cache is not None
        )
        return step


def _alibi(config: PreTrainedConfig) -> Callable[[Step], None]:
    def prepare(step: Step) -> None:
        rows, tokens = step.positions.shape
        dtype, device = step.hidden.dtype, step.hidden.device
        # a key's bias depends on its position alone (softmax ignores the shift by the query's)
        keys = torch.ones(rows, step.kv_tokens, dtype=torch.long, device=device)
        step.position_inputs["alibi"] = build_alibi_tensor(keys, config.n_head, dtype)
        allowed = torch.arange(step.kv_tokens, device=device) <= step.positions[:, :, None]
        blocked = torch.zeros(rows, 1, tokens, step.kv_tokens, dtype=dtype, device=device)
        step.position_inputs["mask"] = blocked.masked_fill(~allowed[:, None], torch.finfo(dtype).min)

    return prepare


ARCHITECTURES = {
    "bloom": Architecture(
        embedding=Embedding,
        layer=Layer,
        head=lambda config: Head(
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon), output_matrix(config, config.hidden_size)
        ),
        embedding_tensors=lambda config: {
            "word_embeddings.weight": _EMBEDDING,
            "norm.weight": "transformer.word_embeddings_layernorm.weight",
            "norm.bias": "transformer.word_embeddings_layernorm.bias",
        },
        head_tensors=lambda config: {
            "norm.weight": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
            "lm_head.weight": tied_or(config, _EMBEDDING),
        },
        layer_prefix=lambda index: f"transformer.h.{index}.",
        positional=_alibi,
    )
}
