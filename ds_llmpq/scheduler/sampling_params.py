"""How a request's tokens are chosen and when it ends: one dataclass, from the row of the batch file to the sampler.

A field with a `Bound` is a parameter that a row's body may hold, and `batch` checks it against that bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_MOST = 2**63


@dataclass(frozen=True)
class Bound:
    """From `low` (exclusive: above it) to `high`; `text` says so in a sentence: "must be " + text. `whole`: integers
    alone."""

    low: float
    high: float
    text: str
    whole: bool = False
    exclusive: bool = False


def _sampling_field(default: Any, *bound: Any, **options: bool) -> Any:
    return field(default=default, metadata={"bound": Bound(*bound, **options)})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """None: as the checkpoint has it; for `seed`, derived from the request's id. Penalties and `min_tokens` are the
    subject of `engine.sampling`, the end of an answer that of `batch.detokenizer`."""

    temperature: float = _sampling_field(0.0, 0, 2, "from 0 (greedy) to 2")
    top_p: float = _sampling_field(1.0, 0, 1, "above 0 and at most 1", exclusive=True)  # 1: off
    top_k: int = _sampling_field(0, 0, _MOST, "0 (off) or more", whole=True)
    seed: int | None = _sampling_field(None, -_MOST, _MOST - 1, "from -2**63 to 2**63 - 1", whole=True)
    min_p: float | None = _sampling_field(None, 0, 1, "from 0 (off) to 1")
    repetition_penalty: float | None = _sampling_field(None, 0, 10, "above 0 and at most 10", exclusive=True)  # 1: off
    presence_penalty: float = _sampling_field(0.0, -2, 2, "from -2 to 2")
    frequency_penalty: float = _sampling_field(0.0, -2, 2, "from -2 to 2")
    min_tokens: int | None = _sampling_field(None, 0, _MOST, "0 (off) or more", whole=True)
    max_tokens: int = _sampling_field(128, 1, _MOST, "at least 1", whole=True)
    stop: tuple[str, ...] = ()  # the answer ends before any of these strings
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = SamplingParams()
