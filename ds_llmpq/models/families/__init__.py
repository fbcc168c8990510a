"""The model families that can be run: one file each, and a line here for each `model_type` of config.json."""

from __future__ import annotations

import importlib

from transformers import PreTrainedConfig

from ds_llmpq.errors import UserError
from ds_llmpq.models.decoder import Decoder

# model_type -> module whose FAMILY it is
_MODULES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen_moe",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "opt": "opt",
    "bloom": "bloom",
}


def decoder_of(config: PreTrainedConfig) -> Decoder:
    """The decoder that a loaded configuration describes; `UserError` if it is of none of the families."""
    if config.model_type not in _MODULES:
        raise UserError(
            f"model_type {config.model_type!r} is not supported; supported are {', '.join(sorted(_MODULES))}."
        )
    module = importlib.import_module(f"ds_llmpq.models.families.{_MODULES[config.model_type]}")
    return Decoder(module.FAMILIES[config.model_type], config)
