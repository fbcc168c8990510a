"""Choosing the next token of every row of a micro-batch: greedy, or temperature with top-k and top-p, seeded by row.

A checkpoint's defaults may truncate the distribution further (min-p, typical and the like), as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.models.generation import Generation
from ds_llmpq.scheduler.sampling_params import SamplingParams

NO_DEFAULTS = Generation()


def draw_uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) for token `step` of a request: a counter-based generator (Philox), so the draw
    depends on nothing but these two numbers, not on order, batch or restarts."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=step)).random()


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingParams], steps: Sequence[int], defaults: Generation = NO_DEFAULTS
) -> torch.Tensor:
    """Next token of each row, [rows] int64 on the logits' device.

    `logits` [rows, vocabulary]; `steps[i]` counts the tokens row i has generated before. `defaults`: the checkpoint's.
    """
    tokens = logits.argmax(dim=-1)
    chosen = [index for index, row in enumerate(rows) if row.temperature > 0]
    if not chosen:
        return tokens
    device = logits.device
    picked = [rows[index] for index in chosen]

    def column(values: list[float]) -> torch.Tensor:
        return to_device(values, device, torch.float64)[:, None]

    draws = column([draw_uniform(row.seed or 0, steps[index]) for index, row in zip(chosen, picked, strict=True)])
    top_p = column([row.top_p for row in picked])
    top_k = column([row.top_k or logits.shape[-1] for row in picked])

    index = None if len(chosen) == len(rows) else to_device(chosen, device)
    ordered, order = torch.sort(
        (logits if index is None else logits[index]).float(), dim=-1, descending=True, stable=True
    )
    # relative to the best token, so that no temperature however small gives an infinite quotient for it
    scaled = (ordered - ordered[:, :1]).double() / column([row.temperature for row in picked])
    if defaults.top_h < 1:
        scaled = _keep_top_h(scaled, defaults.top_h)
    scaled = scaled.masked_fill(torch.arange(ordered.shape[-1], device=device) >= top_k, -torch.inf)
    probability = torch.softmax(scaled, dim=-1)
    # a token stays in while the mass before it is under top_p; the first always does
    before = probability.cumsum(dim=-1) - probability
    probability = probability.masked_fill((before >= top_p) & (before > 0) & (top_p < 1), 0.0)
    probability = _truncate(probability, picked, defaults)
    cumulative = probability.cumsum(dim=-1)
    rank = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=order.shape[-1] - 1)
    found = order.gather(-1, rank)[:, 0]
    return found if index is None else tokens.index_copy_(0, index, found)


def _truncate(probability: torch.Tensor, rows: Sequence[SamplingParams], defaults: Generation) -> torch.Tensor:
    """[rows, vocabulary], the likeliest token first, without those that the further truncations leave out; each acts on
    what the one before has left, and the first token always stays."""
    min_p = [defaults.min_p if row.min_p is None else row.min_p for row in rows]
    if any(min_p):
        bound = to_device(min_p, probability.device, torch.float64)[:, None]
        probability = _keep(probability, probability >= bound * probability[:, :1])
    if defaults.typical_p < 1:
        probability = _keep_typical(probability, defaults.typical_p)
    if 0 < defaults.epsilon_cutoff < 1:
        shares = probability / probability.sum(-1, keepdim=True)
        probability = _keep(probability, shares >= defaults.epsilon_cutoff)
    if 0 < defaults.eta_cutoff < 1:
        shares, cutoff = probability / probability.sum(-1, keepdim=True), defaults.eta_cutoff
        bound = (cutoff**0.5 * torch.exp(-_compute_entropy(shares))).clamp(max=cutoff)
        probability = _keep(probability, shares >= bound)
    return probability


def _keep(probability: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    # tokens as likely as the first are as good
    return probability.masked_fill(~(stays | (probability >= probability[:, :1])), 0.0)


def _compute_entropy(shares: torch.Tensor) -> torch.Tensor:
    """[rows, 1], in nats."""
    return torch.special.entr(shares).sum(-1, keepdim=True)


def _keep_typical(probability: torch.Tensor, mass: float) -> torch.Tensor:
    """The tokens whose surprise is nearest to the expected one, up to `mass`."""
    shares = probability / probability.sum(-1, keepdim=True)
    distance = (-shares.log() - _compute_entropy(shares)).abs()
    near, order = torch.sort(distance, dim=-1, stable=True)
    last = (shares.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=order.shape[-1] - 1)
    leaves = near > near.gather(-1, last)
    leaves[:, :1] = False
    return probability.masked_fill(torch.zeros_like(leaves).scatter(-1, order, leaves), 0.0)


_TOP_H_TOKENS = 100  # transformers looks at so many


def _keep_top_h(scaled: torch.Tensor, share: float) -> torch.Tensor:
    """Logits [rows, vocabulary], the largest first: only the first tokens that make up `share` of the entropy stay."""
    terms = torch.special.entr(torch.softmax(scaled[:, :_TOP_H_TOKENS], dim=-1))
    stays = terms.cumsum(-1) <= terms.sum(-1, keepdim=True) * share
    stays[:, 0] = True
    kept = torch.full_like(scaled, -torch.inf)
    kept[:, : stays.shape[-1]] = scaled[:, : stays.shape[-1]].masked_fill(~stays, -torch.inf)
    return kept
