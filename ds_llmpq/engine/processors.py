"""Logits processors: what a row's settings and its checkpoint's defaults make of the logits before a token is chosen.

Names, formulas and their order are those of transformers' `generate`. Presence and frequency penalties are OpenAI's.
"""

from __future__ import annotations

from collections import abc, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from ds_llmpq.models.generation import Generation
from ds_llmpq.scheduler.request_group import Sequence

_NEVER = -torch.inf


@dataclass
class _Known:
    """The tokens of one sequence, prompt and generated, in an array that grows; `followers`: what came after each
    (n - 1)-gram."""

    row: Sequence
    tokens: np.ndarray
    size: int
    followers: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    counted: int = 0  # tokens whose n-gram is in `followers`

    @classmethod
    def of(cls, row: Sequence) -> _Known:
        tokens = np.empty(row.max_kv_tokens + 1, dtype=np.int64)
        tokens[: len(row.prompt)] = row.prompt
        return cls(row, tokens, len(row.prompt))

    def take(self, generated: abc.Sequence[int]) -> None:
        """All that it has generated; only what is new is copied."""
        size = len(self.row.prompt) + len(generated)
        self.tokens[self.size : size] = generated[self.size - len(self.row.prompt) :]
        self.size = size

    @property
    def generated(self) -> int:
        return self.size - len(self.row.prompt)

    def ends_with(self, words: tuple[int, ...]) -> bool:
        return len(words) <= self.size and tuple(self.tokens[self.size - len(words) : self.size].tolist()) == words

    def find_banned(self, length: int) -> list[int]:
        """Tokens that would repeat an n-gram of this `length`."""
        for end in range(max(self.counted, length - 1), self.size):
            self.followers[tuple(self.tokens[end - length + 1 : end].tolist())].append(int(self.tokens[end]))
        self.counted = self.size
        if self.size + 1 < length:
            return []
        return self.followers.get(tuple(self.tokens[self.size - length + 1 : self.size].tolist()), [])


class LogitsProcessors:
    """Those of the sequences in flight, on the last stage. A row that asks for none costs a look-up."""

    def __init__(self, defaults: Generation):
        self.defaults = defaults
        eos = defaults.eos_token_ids
        words = tuple((word, _NEVER) for word in defaults.bad_words_ids if len(word) > 1 or word[0] not in eos)
        self._biases = (defaults.sequence_bias, words)
        self._known: dict[int, _Known] = {}

    def begin(self, slot: int, row: Sequence) -> None:
        """A row takes a slot."""
        self._known.pop(slot, None)
        if self._asks(row):
            self._known[slot] = _Known.of(row)

    def __call__(
        self, logits: torch.Tensor, slots: abc.Sequence[int], generated: abc.Sequence[abc.Sequence[int]]
    ) -> torch.Tensor:
        """[slots, vocabulary] in float32, processed; the same tensor where no slot asks for anything. `generated`: of
        each slot, all that it has generated."""
        if not self._known or logits.shape[-1] == 1:  # of a pass that was given up
            return logits
        rows = {place: self._known[slot] for place, slot in enumerate(slots) if slot in self._known}
        if not rows:
            return logits
        logits = logits.clone()
        for place, known in rows.items():
            known.take(generated[place])
            self._add_biases(logits[place], known, self._biases[0])
        self._penalize(logits, rows)
        for place, known in rows.items():
            self._forbid(logits[place], known)
        return logits

    def any(self, slot: int) -> bool:
        """Whether the slot's sequence asks for any: then its tokens are needed to go on."""
        return slot in self._known

    def _asks(self, row: Sequence) -> bool:
        sampling, defaults = row.sampling, self.defaults
        own = (self._repetition_penalty(row) != 1, sampling.presence_penalty, sampling.frequency_penalty)
        everywhere = (
            defaults.no_repeat_ngram_size, *self._biases, defaults.forced_bos_token_id is not None,
            defaults.forced_eos_token_id, defaults.suppress_tokens, defaults.begin_suppress_tokens,
        )  # fmt: skip
        ending = not row.sampling.ignore_eos and (
            self._min_tokens(row) or defaults.exponential_decay_length_penalty is not None
        )
        return any((*own, *everywhere, ending))

    def _repetition_penalty(self, row: Sequence) -> float:
        own = row.sampling.repetition_penalty
        return self.defaults.repetition_penalty if own is None else own

    def _min_tokens(self, row: Sequence) -> int:
        """Tokens to generate before the sequence may end."""
        if row.sampling.min_tokens is not None:
            return row.sampling.min_tokens
        return max(self.defaults.min_new_tokens, self.defaults.min_length - len(row.prompt))

    def _penalize(self, logits: torch.Tensor, rows: dict[int, _Known]) -> None:
        """Rows together: one gather and one scatter however many they are."""
        asking = {place: known for place, known in rows.items() if self._repetition_penalty(known.row) != 1}
        if asking:
            places = torch.tensor(list(asking), device=logits.device)[:, None]
            widest = max(known.size for known in asking.values())
            ids = np.stack([_widen(known.tokens[: known.size], widest) for known in asking.values()])
            index = torch.from_numpy(ids).to(logits.device)
            penalty = torch.tensor(
                [[self._repetition_penalty(known.row)] for known in asking.values()], device=logits.device
            )
            found = logits[places, index]
            logits[places, index] = torch.where(found < 0, found * penalty, found / penalty)
        for place, known in rows.items():
            sampling = known.row.sampling
            if known.generated and (sampling.presence_penalty or sampling.frequency_penalty):
                ids, counts = np.unique(known.tokens[len(known.row.prompt) : known.size], return_counts=True)
                loss = torch.from_numpy(counts).to(logits) * sampling.frequency_penalty + sampling.presence_penalty
                logits[place, torch.from_numpy(ids).to(logits.device)] -= loss

    def _forbid(self, logits: torch.Tensor, known: _Known) -> None:
        """The rest of one row's, logits [vocabulary], in transformers' order."""
        defaults, row = self.defaults, known.row
        if defaults.no_repeat_ngram_size:
            logits[known.find_banned(defaults.no_repeat_ngram_size)] = _NEVER
        self._add_biases(logits, known, self._biases[1])
        eos = [token for token in defaults.eos_token_ids if 0 <= token < logits.shape[0]]
        if not row.sampling.ignore_eos and known.generated < self._min_tokens(row):
            logits[eos] = _NEVER
        if known.size == 1 and defaults.forced_bos_token_id is not None:
            _force(logits, (defaults.forced_bos_token_id,))
        if known.generated + 1 == row.max_tokens and defaults.forced_eos_token_id:
            _force(logits, defaults.forced_eos_token_id)
        if defaults.exponential_decay_length_penalty is not None and eos and not row.sampling.ignore_eos:
            start, factor = defaults.exponential_decay_length_penalty
            if known.generated > start:
                found = logits[eos]
                gain = found.abs() * (factor ** (known.generated - start) - 1)
                logits[eos] = found + gain.masked_fill(~found.isfinite(), 0.0)
        logits[list(defaults.suppress_tokens)] = _NEVER
        begins = int(len(row.prompt) <= 1 and defaults.forced_bos_token_id is not None)
        if known.generated == begins:
            logits[list(defaults.begin_suppress_tokens)] = _NEVER

    @staticmethod
    def _add_biases(logits: torch.Tensor, known: _Known, biases: abc.Sequence[tuple[tuple[int, ...], float]]) -> None:
        if not biases:
            return
        total = torch.zeros_like(logits)
        for words, bias in biases:
            if len(words) == 1 or known.ends_with(words[:-1]):
                total[words[-1]] += bias
        logits += total


def _force(logits: torch.Tensor, tokens: abc.Sequence[int]) -> None:
    logits.fill_(_NEVER)
    logits[list(tokens)] = 0.0


def _widen(tokens: np.ndarray, size: int) -> np.ndarray:
    """Filled up with one that is there: penalizing it again writes the same value."""
    return np.concatenate([tokens, np.full(size - len(tokens), tokens[0])])
