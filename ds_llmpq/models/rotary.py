"""Rotary positions: frequencies by the kinds of scaling that checkpoints ask for (`rope_parameters` in config.json).

Formulas: https://arxiv.org/abs/2104.09864 (default), /2306.15595 (linear), /2309.00071 (yarn), /2402.13753 (longrope),
and Llama 3.1's own. `dynamic` is the default as long as no sequence is longer than the model's positions, which no
request is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ds_llmpq.errors import UserError, shown
from ds_llmpq.models.spec import RotarySpec

_MOST = 1e15
_NUMBERS = (
    "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "original_max_position_embeddings", "attention_factor",
)  # fmt: skip


def rotary_spec(config: PreTrainedConfig, head_dim: int, parameters: Mapping[str, Any] | None = None) -> RotarySpec:
    """Of a configuration's `rope_parameters`, or of those given. `UserError`: a kind of scaling that is not known, or a
    number out of range."""
    rope = dict(config.rope_parameters if parameters is None else parameters)
    kind = rope.get("rope_type", "default")
    if kind not in _KINDS:
        raise UserError(f"config.json has rope_type {kind!r}; supported are {', '.join(_KINDS)}.")
    _check_numbers(rope)
    features = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, features, 2, dtype=torch.float, device="cpu") / features
    plain = 1.0 / rope["rope_theta"] ** exponents
    return _KINDS[kind](plain, rope, config)


def _check_numbers(rope: Mapping[str, Any]) -> None:
    """`UserError` for a parameter that is neither a positive number nor left out."""
    for name in _NUMBERS:
        value = rope.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST:
            raise UserError(
                f"config.json has {name}={shown(value)} in rope_parameters; it must be a positive number of at most "
                f"{_MOST:g}."
            )


def _spec(frequencies: torch.Tensor, scaling: float = 1.0, **options: Any) -> RotarySpec:
    return RotarySpec(tuple(frequencies.tolist()), scaling, **options)


def _default(plain: torch.Tensor, rope: Mapping[str, Any], config: PreTrainedConfig) -> RotarySpec:
    return _spec(plain)


def _linear(plain: torch.Tensor, rope: Mapping[str, Any], config: PreTrainedConfig) -> RotarySpec:
    return _spec(plain / rope["factor"])


def _llama3(plain: torch.Tensor, rope: Mapping[str, Any], config: PreTrainedConfig) -> RotarySpec:
    """Long waves are stretched by `factor`, short ones are left, those between blend."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return _spec((1 - blend) * plain / factor + blend * plain)


def _yarn(plain: torch.Tensor, rope: Mapping[str, Any], config: PreTrainedConfig) -> RotarySpec:
    base, original, features = rope["rope_theta"], rope["original_max_position_embeddings"], 2 * len(plain)
    factor = rope.get("factor") or config.max_position_embeddings / original

    def feature(turns: float) -> float:
        """Where a head's features make so many turns over the original positions."""
        return features * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature(rope.get("beta_fast") or 32), feature(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, features - 1)
    high = high + 0.001 if low == high else high
    stretched = ((torch.arange(len(plain), dtype=torch.float, device="cpu") - low) / (high - low)).clamp(0, 1)
    return _spec(plain / factor * stretched + plain * (1 - stretched), _yarn_scaling(rope, factor))


def _yarn_scaling(rope: Mapping[str, Any], factor: float) -> float:
    def of(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(rope["mscale"]) / of(rope["mscale_all_dim"])
    return of(1.0)


def _longrope(plain: torch.Tensor, rope: Mapping[str, Any], config: PreTrainedConfig) -> RotarySpec:
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (plain / torch.tensor(rope[f"{name}_factor"], device="cpu") for name in ("short", "long"))
    return _spec(short, scaling, long_frequencies=tuple(long.tolist()), original_positions=original)


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
