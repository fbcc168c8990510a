"""Configuration group `model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ds_llmpq.fields import path_field


@dataclass
class ModelConfig:
    """`path`: a local folder in Hugging Face format (config.json, safetensors, tokenizer). `shape`: keys of a
    config.json instead, which suffice to plan but not to run."""

    path: str | None = path_field()
    shape: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
