"""Rotary positions: the frequencies of a `RotarySpec`, and the cosines and sines of a micro-batch."""

from __future__ import annotations

import math

import torch

from ds_llmpq.models.spec import RotarySpec
from ds_llmpq.models.step import Step


def compute_frequencies(spec: RotarySpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[features / 2] in float32, and those for long sequences, if they differ."""
    exponents = torch.arange(0, spec.exponents_of, 2, dtype=torch.float, device="cpu") / spec.exponents_of
    plain = 1.0 / spec.theta**exponents
    if spec.kind == "linear":
        return plain / spec.factor, None
    if spec.kind == "llama3":
        return _stretch_long_waves(plain, spec), None
    if spec.kind == "yarn":
        return _stretch_by_turns(plain, spec), None
    if spec.kind == "longrope":
        factors = (torch.tensor(each, device="cpu") for each in (spec.short_factors, spec.long_factors))
        short, long = (plain / each for each in factors)
        return short, long
    return plain, None


def _stretch_long_waves(plain: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
    """Llama 3.1: stretches long waves by `factor`, leaves short ones, and blends between them."""
    low, high = spec.low_freq_factor, spec.high_freq_factor
    turns = spec.original_positions * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / spec.factor + blend * plain


def _stretch_by_turns(plain: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
    """YaRN: stretches features that make few turns over the original positions."""

    def feature(turns: float) -> float:
        """Index of the feature that makes so many turns over the original positions."""
        return spec.features * math.log(spec.original_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = feature(spec.beta_fast), feature(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.features - 1)
    high = high + 0.001 if low == high else high
    stretched = ((torch.arange(len(plain), dtype=torch.float, device="cpu") - low) / (high - low)).clamp(0, 1)
    return plain / spec.factor * stretched + plain * (1 - stretched)


class Angles:
    """Cosines and sines of a step's positions, [rows, tokens, features] each, as `block.rotate` takes them."""

    def __init__(self, spec: RotarySpec, device: torch.device):
        self.spec = spec
        self.frequencies, self.long = (None if each is None else each.to(device) for each in compute_frequencies(spec))

    def __call__(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.frequencies
        if self.long is not None:
            ends = step.positions[:, -1] if step.last is None else step.positions.gather(1, step.last[:, None])[:, 0]
            is_long = (ends >= self.spec.original_positions)[:, None, None]
            frequencies = torch.where(is_long, self.long, frequencies)
        angles = step.positions[..., None].float() * frequencies
        cos, sin = angles.cos() * self.spec.scaling, angles.sin() * self.spec.scaling
        both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return tuple(part.to(step.hidden.dtype) for part in both)
