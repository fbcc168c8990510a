"""What the engine must know of a Hugging Face architecture, and the table of those it knows.

A further architecture is one module that builds an `Architecture` and one line in `_modules`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import refuse_planned_only
from ds_llmpq.models.step import Step

# model_type in config.json -> module that defines ARCHITECTURE(S)
_modules = {
    "llama": "llama_like",
    "mistral": "llama_like",
    "qwen2": "llama_like",
    "qwen3": "llama_like",
    "opt": "opt",
    "bloom": "bloom",
}


@dataclass(frozen=True)
class Architecture:
    """Builders of the pipeline's layers, each a module that maps a `Step` to a `Step`, and their tensors' names.

    Modules are built under whatever device context the caller sets (the loader uses `meta`), and the mappings say which
    checkpoint tensor fills which of their parameters.
    """

    embedding: Callable[[PreTrainedConfig], nn.Module]
    layer: Callable[[PreTrainedConfig, int], nn.Module]
    head: Callable[[PreTrainedConfig], nn.Module]
    # parameter name in the module -> tensor name in the checkpoint
    embedding_tensors: Callable[[PreTrainedConfig], dict[str, str]]
    head_tensors: Callable[[PreTrainedConfig], dict[str, str]]
    # prefix of decoder layer i's tensors in the checkpoint; parameters of the module live under `layer.`
    layer_prefix: Callable[[int], str]
    # builds what a stage computes once per micro-batch (rotary embeddings, ALiBi); holds no checkpoint tensors
    positional: Callable[[PreTrainedConfig], Callable[[Step], None]]


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a loaded configuration; `UserError` if it is none of the supported ones."""
    if config.model_type not in _modules:
        refuse_planned_only(config.model_type)
        raise UserError(
            f"model_type {config.model_type!r} is not supported; supported are {', '.join(sorted(_modules))}."
        )
    module = importlib.import_module(f"ds_llmpq.models.{_modules[config.model_type]}")
    return module.ARCHITECTURES[config.model_type]


class DecoderLayer(nn.Module):
    """A transformers decoder layer as a pipeline layer: adapts its keyword arguments to a `Step`."""

    def __init__(self, layer: nn.Module, window: int | None = None):
        super().__init__()
        self.layer = layer
        self.window = window  # sliding attention window in tokens
        # the name of the cache argument: up to transformers 5.23 the second, from 5.24 on the first
        takes = inspect.signature(layer.forward).parameters
        self.cache_argument = "cache" if "cache" in takes else "past_key_values"

    def forward(self, step: Step) -> Step:
        step.hidden = self.layer(
            step.hidden,
            attention_mask=step.mask(self.window),
            position_ids=step.positions,
            use_cache=step.cache is not None,
            **{self.cache_argument: step.cache},
            **step.prepared(),
        )
        return step


class Head(nn.Module):
    """Final norm, optional projection, and the output matrix, applied where the step asks for logits."""

    def __init__(self, norm: nn.Module | None, lm_head: nn.Module, project_out: nn.Module | None = None):
        super().__init__()
        self.norm = norm
        self.project_out = project_out
        self.lm_head = lm_head

    def forward(self, step: Step) -> Step:
        hidden = step.at_last()
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        step.logits = self.lm_head(hidden)
        return step


def no_positional(config: PreTrainedConfig) -> Callable[[Step], None]:
    return lambda step: None


def output_matrix(config: PreTrainedConfig, features: int) -> nn.Linear:
    return nn.Linear(features, config.vocab_size, bias=False)


def tied_or(config: PreTrainedConfig, embedding_tensor: str) -> str:
    """Name of the tensor that fills the output matrix."""
    return embedding_tensor if config.tie_word_embeddings else "lm_head.weight"


def fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts `tensors` in the place of the module's parameters of those names (the module may be on `meta`).

    `UserError` for a tensor of another shape than the configuration says.
    """
    for name, tensor in tensors.items():
        check_shape(name, tensor, module.get_parameter(name).shape)
    module.load_state_dict(tensors, strict=False, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """`UserError` if a checkpoint's tensor has not the `shape` that follows from its config.json."""
    if tensor.shape != shape:
        raise UserError(
            f"Tensor {name!r} has shape {tuple(tensor.shape)} instead of {tuple(shape)}: the weights are not those "
            "that config.json describes; fetch the checkpoint again."
        )
