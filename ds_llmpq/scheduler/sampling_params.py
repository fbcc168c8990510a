"""How a sequence's tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowSampling:
    """How one request samples. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in. None: as the
    checkpoint has it. Penalties and `min_tokens` are `engine.processors`' subject."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int | None = None


GREEDY = RowSampling()
