"""One micro-batch on its way through a stage, and its attention mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, for attention. `in_place`: `attend` stores new ones and attends to all, where
    they lie, instead of `update`."""

    in_place: bool

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new ones, [rows, key/value heads, tokens, size], and returns those that attention sees. `layer_idx`
        counts in the whole model."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: Any) -> torch.Tensor:
        """What the attention `layer` of a decode pass finds, [rows, heads, 1, size], if `in_place`."""

    def rows(self, start: int, stop: int) -> KeyValueCache:
        """The cache of rows [start, stop) of the micro-batch alone."""

    @property
    def prefix_tokens(self) -> int:
        """Length of the prefix that rows of a decode pass may share."""

    def prefix(self, layer_idx: int) -> torch.Tensor:
        """Its keys and values, [2, key/value heads, prefix tokens, size]."""


@dataclass
class Step:
    """A micro-batch between two layers: `token_ids` enter the first stage, `hidden` passes on, `logits` leave the last.

    Rows are right-padded, so token k of a row is at position k, and causality alone hides the padding.
    Shapes: token_ids and positions [rows, tokens]; hidden [rows, tokens, hidden]; `last` [rows] or None: the index of
    each row's last real token, where the head is applied (None: at every token); logits [rows, (tokens,) vocabulary].

    `kv_tokens`: cache positions that attention sees. `causal_only`: no explicit mask is needed, which is so in prefill,
    and in decode if every row is at the last of the `kv_tokens` positions. `shared` [rows], of a decode pass: how many
    tokens of each row are the cache's prefix, all or none, to which the row attends apart; `kv_tokens` are then those
    behind it. None: no row has the prefix.
    """

    positions: torch.Tensor
    cache: KeyValueCache | None
    kv_tokens: int
    causal_only: bool
    token_ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    last: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    # fills `position_inputs` with what a stage computes once per micro-batch: rotary angles, ALiBi
    prepare: Callable[[Step], None] | None = None
    position_inputs: dict[str, Any] = field(default_factory=dict)
    # by window: layers share them
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Step:
        """A new step of rows [start, stop) alone, to run instead."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Step(
            positions=self.positions[start:stop],
            cache=None if self.cache is None else self.cache.rows(start, stop),
            kv_tokens=self.kv_tokens,
            causal_only=self.causal_only,
            shared=cut(self.shared),
            token_ids=cut(self.token_ids),
            hidden=cut(self.hidden),
            last=cut(self.last),
            prepare=self.prepare,
        )

    def exchange_rows(self, by: Mapping[int, int]) -> Step:
        """A step of the same shape, to run instead, in which row k has the tokens or states of row `by[k]`, but its own
        positions and place in the cache."""
        index = torch.tensor([by.get(row, row) for row in range(self.positions.shape[0])], device=self.positions.device)

        def select(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self, token_ids=select(self.token_ids), hidden=select(self.hidden), last=select(self.last), logits=None,
            position_inputs={}, _masks={}, _biases={},
        )  # fmt: skip

    def prepare_inputs(self) -> dict[str, Any]:
        """The position inputs, computed when the first decoder layer of the stage needs them."""
        if self.prepare is not None:
            self.prepare(self)
            self.prepare = None
        return self.position_inputs

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """Boolean mask [rows, 1, tokens, keys], true where a query may attend; None if causality suffices."""
        if self.shared is None and self.causal_only and (window is None or self.kv_tokens <= window):
            return None
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """`mask` as numbers to add, 0 or minus infinity. torch makes them of a boolean mask in every call, which takes
        three small operations a layer."""
        mask = self.mask(window)
        if mask is not None and window not in self._biases:
            self._biases[window] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        return None if mask is None else self._biases[window]

    def _mask(self, window: int | None) -> torch.Tensor:
        keys, queries = self.keys(), self.positions[:, :, None]
        if self.shared is not None:
            queries = queries - self.shared[:, None, None]
        allowed = keys <= queries
        if window is not None:
            allowed &= keys > queries - window
        if self.shared is not None:
            allowed &= keys >= -self.shared[:, None, None]
        return allowed[:, None]

    def keys(self) -> torch.Tensor:
        """[keys]: positions of the keys that attention sees; where a prefix is attended to apart, its are negative, for
        the first position behind it is 0, as it is for rows without the prefix."""
        first = 0 if self.shared is None else -self.cache.prefix_tokens
        return torch.arange(first, self.kv_tokens, device=self.positions.device)

    def at_last(self) -> torch.Tensor:
        """Hidden states that the head is applied to: [rows, hidden], or all if `last` is None."""
        if self.last is None:
            return self.hidden
        rows = torch.arange(self.hidden.shape[0], device=self.hidden.device)
        return self.hidden[rows, self.last]
