"""Choosing the next token of every row of a micro-batch: greedy, or temperature with top-k and top-p, seeded by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class RowSampling:
    """How one request samples. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


GREEDY = RowSampling()


def uniform_draw(seed: int, step: int) -> float:
    """The random number in [0, 1) for token `step` of a request: a counter-based generator (Philox), so the draw
    depends on nothing but these two numbers, not on order, batch or restarts."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=step)).random()


def sample(logits: torch.Tensor, rows: Sequence[RowSampling], steps: Sequence[int]) -> torch.Tensor:
    """Next token of each row, [rows] int64 on the logits' device.

    `logits` [rows, vocabulary]; `steps[i]` counts the tokens row i has generated before.
    """
    tokens = logits.argmax(dim=-1)
    chosen = [index for index, row in enumerate(rows) if row.temperature > 0]
    if not chosen:
        return tokens
    device = logits.device
    picked = [rows[index] for index in chosen]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    draws = column([uniform_draw(row.seed, steps[index]) for index, row in zip(chosen, picked, strict=True)])
    top_p = column([row.top_p for row in picked])
    top_k = column([row.top_k or logits.shape[-1] for row in picked])

    ordered, order = torch.sort(logits[chosen].float(), dim=-1, descending=True, stable=True)
    # relative to the best token, so that no temperature however small gives an infinite quotient for it
    scaled = (ordered - ordered[:, :1]).double() / column([row.temperature for row in picked])
    scaled = scaled.masked_fill(torch.arange(ordered.shape[-1], device=device) >= top_k, -torch.inf)
    probability = torch.softmax(scaled, dim=-1)
    # a token stays in while the mass before it is under top_p; the first always does
    before = probability.cumsum(dim=-1) - probability
    probability = probability.masked_fill((before >= top_p) & (before > 0) & (top_p < 1), 0.0)
    cumulative = probability.cumsum(dim=-1)
    rank = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=order.shape[-1] - 1)
    tokens[chosen] = order.gather(-1, rank)[:, 0]
    return tokens
