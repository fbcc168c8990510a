"""Reads rotary positions from config.json (`rope_parameters`, formerly `rope_scaling` and others). No torch.

Formulas: https://arxiv.org/abs/2104.09864 (default), /2306.15595 (linear), /2309.00071 (yarn), /2402.13753 (longrope),
and Llama 3.1's own. `dynamic` equals the default for sequences within the model's positions, and no request is longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt, Le, MaxLen

from ds_llmpq.errors import UserError, quote
from ds_llmpq.models.family import CONFIG, FULL, REMEDY, SLIDING, Part
from ds_llmpq.models.spec import RotarySpec
from ds_llmpq.validation import one_of, validate

_Factor = Annotated[float, Gt(0), Le(1e15)]
_Factors = Annotated[tuple[_Factor, ...], MaxLen(10_000)]
_NAMES = {"su": "longrope"}  # former name -> today's


@dataclass(frozen=True)
class _RopeKeys:
    rope_type: one_of("default", "linear", "dynamic", "llama3", "yarn", "longrope") = "default"
    rope_theta: _Factor = 10_000.0
    partial_rotary_factor: Part = 1.0
    factor: _Factor | None = None
    original_max_position_embeddings: _Factor | None = None
    low_freq_factor: _Factor | None = None
    high_freq_factor: _Factor | None = None
    beta_fast: _Factor = 32.0
    beta_slow: _Factor = 1.0
    truncate: bool = True
    attention_factor: _Factor | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: _Factors | None = None
    long_factor: _Factors | None = None


_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rotary(
    given: Mapping[str, Any] | None, head_dim: int, max_positions: int, defaults: Mapping[str, Any]
) -> RotarySpec:
    """given: `rope_parameters`. defaults: values for missing keys. In both, None counts as missing.

    `UserError`: an unknown kind of scaling, a number out of range, or a missing key that the kind needs.
    """
    rope = {name: value for name, value in (given or {}).items() if value is not None}
    if nested := {FULL, SLIDING} & set(rope):
        raise UserError(
            f"{CONFIG} has rope_parameters for {sorted(nested)[0]} apart, which this model_type has not; {REMEDY}."
        )
    rope = {name: value for name, value in defaults.items() if value is not None} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope["rope_type"] = _NAMES.get(kind, kind) if isinstance(kind, str) else kind
    keys = validate(_RopeKeys, rope, f"{CONFIG}: rope_parameters", REMEDY, ignore_unknown=True)
    for name in _REQUIRED.get(keys.rope_type, ()):
        if getattr(keys, name) is None:
            raise UserError(
                f"{CONFIG} has rope_parameters of the type {keys.rope_type} that lack the key {name}; {REMEDY}."
            )
    return _build(keys, head_dim, max_positions)


def _build(keys: _RopeKeys, head_dim: int, max_positions: int) -> RotarySpec:
    features = 2 * -(-int(head_dim * keys.partial_rotary_factor) // 2)
    if not 0 < features <= head_dim:
        raise UserError(
            f"{CONFIG} has heads of {head_dim} features with partial_rotary_factor={keys.partial_rotary_factor}: an "
            f"even number of them must be rotated; {REMEDY}."
        )
    kind = "default" if keys.rope_type == "dynamic" else keys.rope_type
    plain = {"kind": kind, "features": features, "exponents_of": int(head_dim * keys.partial_rotary_factor)}
    if kind == "default":
        return RotarySpec(theta=keys.rope_theta, **plain)
    original = keys.original_max_position_embeddings or float(max_positions)
    factor = keys.factor or max_positions / original
    if kind == "longrope":
        _check_lengths(keys, features // 2)
    if kind == "llama3" and keys.high_freq_factor <= keys.low_freq_factor:
        raise UserError(
            f"{CONFIG} has high_freq_factor={keys.high_freq_factor} in rope_parameters; it must be above "
            f"low_freq_factor={keys.low_freq_factor}."
        )
    return RotarySpec(
        theta=keys.rope_theta, factor=factor, original_positions=original, scaling=_scaling(keys, factor, original),
        low_freq_factor=keys.low_freq_factor or 0.0, high_freq_factor=keys.high_freq_factor or 0.0,
        beta_fast=keys.beta_fast, beta_slow=keys.beta_slow, truncate=keys.truncate,
        short_factors=keys.short_factor or (), long_factors=keys.long_factor or (), **plain,
    )  # fmt: skip


def _check_lengths(keys: _RopeKeys, pairs: int) -> None:
    for name in ("short_factor", "long_factor"):
        if len(getattr(keys, name)) != pairs:
            raise UserError(
                f"{CONFIG} has {len(getattr(keys, name))} numbers as {name} of rope_parameters, "
                f"{quote(getattr(keys, name))}; there must be {pairs}."
            )


def _scaling(keys: _RopeKeys, factor: float, original: float) -> float:
    """The factor on cosines and sines."""
    if keys.rope_type in ("yarn", "longrope") and keys.attention_factor is not None:
        return keys.attention_factor
    if keys.rope_type == "longrope":
        return 1.0 if factor <= 1.0 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if keys.rope_type != "yarn":
        return 1.0
    if keys.mscale and keys.mscale_all_dim:
        return _yarn_scale(factor, keys.mscale) / _yarn_scale(factor, keys.mscale_all_dim)
    return _yarn_scale(factor, 1.0)


def _yarn_scale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
