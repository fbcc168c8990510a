"""The jobs of a simulation: arrival times, lengths of prompts and answers, and predicted lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_llmpq.errors import UserError


@dataclass(frozen=True)
class Jobs:
    """Arrays of one entry a job, by arrival. `predicted_tokens` is what a scheduler may know of `generated_tokens`."""

    arrival_seconds: np.ndarray  # float, ascending
    generated_tokens: np.ndarray  # int, at least 1
    prompt_tokens: np.ndarray  # int
    predicted_tokens: np.ndarray  # float, not negative

    @classmethod
    def from_arrays(
        cls,
        arrival_seconds: np.ndarray,
        generated_tokens: np.ndarray,
        prompt_tokens: np.ndarray | None = None,
        predicted_tokens: np.ndarray | None = None,
    ) -> Jobs:
        """Checked and sorted by arrival (stable). Without predictions, the lengths themselves stand in for them."""
        arrival = np.asarray(arrival_seconds, dtype=float)
        generated = np.asarray(generated_tokens, dtype=np.int64)
        prompt = np.zeros_like(generated) if prompt_tokens is None else np.asarray(prompt_tokens, dtype=np.int64)
        predicted = np.asarray(generated if predicted_tokens is None else predicted_tokens, dtype=float)
        if not len(arrival) == len(generated) == len(prompt) == len(predicted):
            raise UserError(
                f"There are {len(arrival)} arrivals, {len(generated)} lengths, {len(prompt)} prompts and "
                f"{len(predicted)} predictions, but each job needs one of each."
            )
        if not len(arrival):
            raise UserError("There is no job to simulate; give jobs=1 or more.")
        if not np.isfinite(arrival).all() or not np.isfinite(predicted).all() or predicted.min() < 0:
            raise UserError("Arrivals and predictions must be finite numbers, predictions not negative.")
        if generated.min() < 1 or prompt.min() < 0:
            raise UserError("Every job must generate at least 1 token and must not have a negative prompt.")
        order = np.argsort(arrival, kind="stable")
        return cls(arrival[order], generated[order], prompt[order], predicted[order])

    def __len__(self) -> int:
        return len(self.arrival_seconds)
