"""The supported model families: one file each, and a line here for each `model_type` of config.json. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ds_llmpq.errors import UserError, quote
from ds_llmpq.models.family import Description, Family

# model_type -> module whose FAMILIES has it
_MODULES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "opt": "opt",
    "bloom": "bloom",
}
SUPPORTED = tuple(_MODULES)


def find_family(model_type: object) -> Family | None:
    """None if it is not supported."""
    if not isinstance(model_type, str) or model_type not in _MODULES:
        return None
    return importlib.import_module(f"ds_llmpq.models.families.{_MODULES[model_type]}").FAMILIES[model_type]


def describe(config: Mapping[str, Any]) -> Description:
    """What a config.json describes. `UserError`: its model_type is not supported, or its keys are invalid."""
    model_type = config.get("model_type")
    family = find_family(model_type)
    if family is None:
        raise UserError(f"model_type {quote(model_type)} is not supported; supported are {', '.join(SUPPORTED)}.")
    dtype = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None), None)
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    return Description(model_type, family, family.read_spec(config), dtype)
