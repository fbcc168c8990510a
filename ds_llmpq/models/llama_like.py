"""Llama, Mistral, Qwen2 and Qwen3: rotary positions, RMS norms, gated MLP; they differ in biases, norms and windows."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from ds_llmpq.models.architecture import Architecture, DecoderLayer, Head, output_matrix, tied_or
from ds_llmpq.models.step import Step

_EMBEDDING = "model.embed_tokens.weight"


class Embedding(nn.Module):
    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, step: Step) -> Step:
        step.hidden = self.embed_tokens(step.token_ids)
        return step


def _window(config: PreTrainedConfig, index: int) -> int | None:
    """Sliding window of decoder layer `index`: by layer type where the configuration has them, else for all layers."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _rotary(rotary_class: type[nn.Module], config: PreTrainedConfig) -> Callable[[Step], None]:
    rotary = rotary_class(config)

    def prepare(step: Step) -> None:
        step.position_inputs["position_embeddings"] = rotary.to(step.hidden.device)(step.hidden, step.positions)

    return prepare


def _family(layer: type[nn.Module], norm: type[nn.Module], rotary: type[nn.Module], windowed: bool) -> Architecture:
    return Architecture(
        embedding=Embedding,
        layer=lambda config, index: DecoderLayer(layer(config, index), _window(config, index) if windowed else None),
        head=lambda config: Head(
            norm(config.hidden_size, eps=config.rms_norm_eps), output_matrix(config, config.hidden_size)
        ),
        embedding_tensors=lambda config: {"embed_tokens.weight": _EMBEDDING},
        head_tensors=lambda config: {"norm.weight": "model.norm.weight", "lm_head.weight": tied_or(config, _EMBEDDING)},
        layer_prefix=lambda index: f"model.layers.{index}.",
        positional=lambda config: _rotary(rotary, config),
    )


ARCHITECTURES = {
    "llama": _family(
        modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaRMSNorm, modeling_llama.LlamaRotaryEmbedding, False
    ),
    "mistral": _family(
        modeling_mistral.MistralDecoderLayer,
        modeling_mistral.MistralRMSNorm,
        modeling_mistral.MistralRotaryEmbedding,
        True,
    ),
    "qwen2": _family(
        modeling_qwen2.Qwen2DecoderLayer, modeling_qwen2.Qwen2RMSNorm, modeling_qwen2.Qwen2RotaryEmbedding, True
    ),
    "qwen3": _family(
        modeling_qwen3.Qwen3DecoderLayer, modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3RotaryEmbedding, True
    ),
}
