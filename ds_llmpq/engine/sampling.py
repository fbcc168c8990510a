"""From logits to the next token of every row of a micro-batch.

Logits processors first: what a row's settings and its checkpoint's defaults make of the logits. Their names, formulas
and order are those of transformers' `generate`; presence and frequency penalties are OpenAI's. Then the choice: greedy,
or temperature with top-k and top-p, seeded by row. A checkpoint's defaults may truncate the distribution further
(min-p, typical and the like), as transformers does.
"""

from __future__ import annotations

from collections import abc, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.models.generation import Generation
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams

NO_DEFAULTS = Generation()


def draw_uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) for token `step` of a request: a counter-based generator (Philox), so the draw
    depends on nothing but these two numbers, not on order, batch or restarts."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=step)).random()


def sample(
    logits: torch.Tensor,
    rows: abc.Sequence[SamplingParams],
    steps: abc.Sequence[int],
    defaults: Generation = NO_DEFAULTS,
) -> torch.Tensor:  # fmt: skip
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


def choose_greedily(logits: torch.Tensor, processed: torch.Tensor) -> torch.Tensor:
    """[2, rows] int64, of float32 [rows, vocabulary] on the CPU: the place of each row's largest processed logit, and
    whether its logits are numbers. By numpy: torch's threads would wake up, and keep the cores from the next pass's."""
    sound = np.isfinite(logits.numpy().max(-1))  # NaN passes through the maximum
    return torch.from_numpy(np.stack([processed.numpy().argmax(-1), sound]))


def _truncate(probability: torch.Tensor, rows: abc.Sequence[SamplingParams], defaults: Generation) -> torch.Tensor:
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
            places = to_device(list(asking), logits.device)[:, None]
            widest = max(known.size for known in asking.values())
            ids = np.stack([_widen(known.tokens[: known.size], widest) for known in asking.values()])
            index = to_device(ids, logits.device)
            penalty = to_device([[self._repetition_penalty(known.row)] for known in asking.values()], logits.device)
            found = logits[places, index]
            logits[places, index] = torch.where(found < 0, found * penalty, found / penalty)
        for place, known in rows.items():
            sampling = known.row.sampling
            if known.generated and (sampling.presence_penalty or sampling.frequency_penalty):
                ids, counts = np.unique(known.tokens[len(known.row.prompt) : known.size], return_counts=True)
                loss = counts * sampling.frequency_penalty + sampling.presence_penalty
                index = to_device(ids, logits.device)
                logits[place].index_add_(0, index, to_device(loss, logits.device, logits.dtype), alpha=-1)

    def _forbid(self, logits: torch.Tensor, known: _Known) -> None:
        """The rest of one row's, logits [vocabulary], in transformers' order."""
        defaults, row = self.defaults, known.row
        if defaults.no_repeat_ngram_size:
            _set(logits, known.find_banned(defaults.no_repeat_ngram_size), _NEVER)
        self._add_biases(logits, known, self._biases[1])
        eos = [token for token in defaults.eos_token_ids if 0 <= token < logits.shape[0]]
        if not row.sampling.ignore_eos and known.generated < self._min_tokens(row):
            _set(logits, eos, _NEVER)
        if known.size == 1 and defaults.forced_bos_token_id is not None:
            _force(logits, (defaults.forced_bos_token_id,))
        if known.generated + 1 == row.max_tokens and defaults.forced_eos_token_id:
            _force(logits, defaults.forced_eos_token_id)
        if defaults.exponential_decay_length_penalty is not None and eos and not row.sampling.ignore_eos:
            start, factor = defaults.exponential_decay_length_penalty
            if known.generated > start:
                index = to_device(eos, logits.device)
                found = logits[index]
                gain = found.abs() * (factor ** (known.generated - start) - 1)
                logits[index] = found + gain.masked_fill(~found.isfinite(), 0.0)
        _set(logits, defaults.suppress_tokens, _NEVER)
        begins = int(len(row.prompt) <= 1 and defaults.forced_bos_token_id is not None)
        if known.generated == begins:
            _set(logits, defaults.begin_suppress_tokens, _NEVER)

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
    _set(logits, tokens, 0.0)


def _set(logits: torch.Tensor, tokens: abc.Sequence[int], value: float) -> None:
    if tokens:
        logits.index_fill_(0, to_device(tokens, logits.device), value)


def _widen(tokens: np.ndarray, size: int) -> np.ndarray:
    """Filled up with one that is there: penalizing it again writes the same value."""
    return np.concatenate([tokens, np.full(size - len(tokens), tokens[0])])
