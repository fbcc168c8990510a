"""Static key/value store of one stage: allocated once, viewed anew for each shape of slots, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_llmpq.errors import UserError


class KVStore:
    """Keys and values of a stage's decoder layers for all sequences in flight.

    The memory holds `positions` tokens a layer; `shape_for(slots, capacity)` views it as slots x capacity, so few long
    sequences and many short ones use the same bytes. A decode micro-batch is a slice of slots: regrouping sequences
    from prefill to decode copies nothing, and a slot's next sequence overwrites the last one's.
    """

    def __init__(
        self,
        first_layer: int,
        layers: int,
        positions: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.first_layer = first_layer
        self.positions = positions
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self._memory = torch.empty(layers, 2, positions * kv_heads * head_dim, dtype=dtype, device=device)
        self._memory.zero_()  # written, so that memory is taken now and not bit by bit while serving
        self.shape_for(1, positions)

    @property
    def allocated_bytes(self) -> int:
        return self._memory.numel() * self._memory.element_size()

    def shape_for(self, slots: int, capacity: int) -> None:
        """Views the store as `slots` sequences of up to `capacity` tokens; earlier contents become meaningless."""
        if slots * capacity > self.positions:
            raise UserError(
                f"{slots} sequences of {capacity} tokens need {slots * capacity} cache positions, but the plan has "
                f"{self.positions}; plan for a larger workload."
            )
        layers = self._memory.shape[0]
        used = self._memory[:, :, : slots * capacity * self.kv_heads * self.head_dim]
        self._view = used.view(layers, 2, slots, self.kv_heads, capacity, self.head_dim)
        self.capacity = capacity

    def clear(self, slot: int | None = None) -> None:
        """Forgets a slot's contents, or all. Masked positions count with weight 0, which a NaN left there would
        survive."""
        if slot is None:
            self._memory.zero_()
        else:
            self._view[:, :, slot].zero_()

    def prefill(self, slots: Sequence[int]) -> PrefillCache:
        first, last = slots[0], slots[-1]
        together = last - first + 1 == len(slots)
        return PrefillCache(self, slice(first, last + 1) if together else torch.tensor(slots, device=self._view.device))

    def decode(self, start: int, stop: int, positions: torch.Tensor, kv_tokens: int) -> DecodeCache:
        """`positions` [slots]: where each new token is stored; attention sees the first `kv_tokens`."""
        heads = torch.arange(start * self.kv_heads, stop * self.kv_heads, device=positions.device)
        places = heads.view(-1, self.kv_heads) * self.capacity + positions[:, None]
        return DecodeCache(self, slice(start, stop), places, kv_tokens)

    def layer(self, layer_idx: int) -> torch.Tensor:
        """[2, slots, kv_heads, capacity, head_dim] of a decoder layer, by its index in the whole model."""
        return self._view[layer_idx - self.first_layer]


@dataclass
class PrefillCache:
    """Stores whole prompts from position 0 on; attention uses the fresh keys and values."""

    store: KVStore
    slots: slice | torch.Tensor

    def rows(self, start: int, stop: int) -> PrefillCache:
        if isinstance(self.slots, slice):
            return PrefillCache(self.store, slice(self.slots.start + start, self.slots.start + stop))
        return PrefillCache(self.store, self.slots[start:stop])

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = key.shape[2]
        cached = self.store.layer(layer_idx)
        for part, fresh in zip(cached, (key, value), strict=True):
            if isinstance(self.slots, slice):
                part[self.slots, :, :tokens] = fresh
            else:
                part[:, :, :tokens].index_copy_(0, self.slots, fresh)
        return key, value


@dataclass
class DecodeCache:
    """Stores one token a row at that row's own position; attention uses all stored tokens.

    places [slots, kv_heads]: where each head's vector goes, counted in vectors of all slots, heads and positions.
    """

    store: KVStore
    slots: slice
    places: torch.Tensor
    kv_tokens: int

    def rows(self, start: int, stop: int) -> DecodeCache:
        slots = slice(self.slots.start + start, self.slots.start + stop)
        return DecodeCache(self.store, slots, self.places[start:stop], self.kv_tokens)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        places, cached = self.places.view(-1), self.store.layer(layer_idx)
        for part, fresh in zip(cached, (key, value), strict=True):
            part.view(-1, self.store.head_dim).index_copy_(0, places, fresh.reshape(-1, self.store.head_dim))
        keys, values = cached[:, self.slots, :, : self.kv_tokens]
        return keys, values
