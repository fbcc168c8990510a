"""The modules around the decoder blocks of a `DecoderSpec`: embedding, head, and positions."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import nn

from ds_llmpq.models.block import Norm, cap
from ds_llmpq.models.rotary import Angles
from ds_llmpq.models.spec import DecoderSpec
from ds_llmpq.models.step import Step


@cache
def _round(value: float, dtype: torch.dtype) -> float:
    """To the dtype, as factors are in training."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def _make_embedding(count: int, width: int) -> nn.Embedding:
    """Empty. To draw its first values on `meta` would load torch's compilers: a second, and 20 MB in every rank."""
    return nn.Embedding.from_pretrained(torch.empty(count, width))


class Embedding(nn.Module):
    """Maps token ids to hidden states."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.spec = spec
        self.embed_tokens = _make_embedding(spec.vocab, spec.width)
        projected, positions = spec.width != spec.hidden, spec.learned_positions
        self.project_in = nn.Linear(spec.width, spec.hidden, bias=False) if projected else None
        self.embed_positions = _make_embedding(positions, spec.hidden) if positions else None
        self.norm = Norm(spec.hidden, spec.embedding_norm) if spec.embedding_norm else None

    def forward(self, step: Step) -> Step:
        hidden = self.embed_tokens(step.token_ids)
        if self.spec.embedding_scale is not None:
            hidden = hidden * _round(self.spec.embedding_scale, hidden.dtype)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(step.positions + self.spec.position_offset)
        step.hidden = hidden if self.norm is None else self.norm(hidden)
        return step


class Head(nn.Module):
    """Final norm, optional projection and lm_head, applied to the tokens for which the step wants logits."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.logit_cap = spec.logit_cap
        self.norm = Norm(spec.hidden, spec.final_norm) if spec.final_norm else None
        self.project_out = nn.Linear(spec.hidden, spec.width, bias=False) if spec.width != spec.hidden else None
        self.lm_head = nn.Linear(spec.width, spec.vocab, bias=False)

    def forward(self, step: Step) -> Step:
        hidden = step.at_last()
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        step.logits = cap(self.lm_head(hidden), self.logit_cap)
        return step


class Positions:
    """Computes once what all layers of a stage need from a micro-batch's positions, and puts it into
    `step.position_inputs`: cosines and sines [rows, tokens, features] for `block.rotate`, by the names of
    `DecoderSpec.rotary`; and ALiBi's `bias` [rows or 1, heads, tokens, keys], which is the most negative number where a
    query may not attend."""

    def __init__(self, spec: DecoderSpec, device: torch.device):
        self.rotary = {name: Angles(rotary, device) for name, rotary in spec.rotary}
        self.slopes = (
            torch.tensor(compute_alibi_slopes(spec.attention.heads), device=device) if spec.attention.alibi else None
        )

    def __call__(self, step: Step) -> None:
        for name, angles in self.rotary.items():
            step.position_inputs[name] = angles(step)
        if self.slopes is not None:
            step.position_inputs["bias"] = self._bias(step)

    def _bias(self, step: Step) -> torch.Tensor:
        dtype = step.hidden.dtype
        keys = step.keys()
        # the bias depends on the key's position alone, because softmax ignores the shift by the query's position
        bias = (self.slopes[:, None] * keys)[:, None].to(dtype)
        if step.shared is not None:
            return torch.where(step.mask(), bias, torch.finfo(dtype).min)
        if step.causal_only and step.positions.shape[1] == 1:
            return bias[None]
        # if causality suffices, all rows are at the same positions
        positions = step.positions[:1] if step.causal_only else step.positions
        allowed = keys <= positions[:, None, :, None]
        return torch.where(allowed, bias, torch.finfo(dtype).min)


def compute_alibi_slopes(heads: int) -> list[float]:
    """A geometric series for a power of two; else the series of the next lower power, then every other slope of the
    next higher one. https://arxiv.org/abs/2108.12409"""

    def series(count: int) -> list[float]:
        base = 2.0 ** -(2.0 ** -(math.log2(count) - 3))
        return [base**power for power in range(1, count + 1)]

    lower = 2 ** math.floor(math.log2(heads))
    return series(lower) + series(2 * lower)[::2][: heads - lower]
