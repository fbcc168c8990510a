"""Static key/value store of one stage: allocated once, viewed anew by each wave, sliced by rows for a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_llmpq.errors import UserError


class KVStore:
    """Keys and values of a stage's decoder layers for all sequences in flight.

    The memory holds `slots` tokens a layer; `shape_for(rows, capacity)` views it as rows x capacity, so waves of few
    long sequences and of many short ones use the same bytes. A micro-batch is a slice of rows: regrouping rows from
    prefill to decode micro-batches copies nothing.
    """

    def __init__(
        self,
        first_layer: int,
        layers: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.first_layer = first_layer
        self.slots = slots
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self._memory = torch.zeros(layers, 2, slots * kv_heads * head_dim, dtype=dtype, device=device)
        self.shape_for(1, slots)

    @property
    def allocated_bytes(self) -> int:
        return self._memory.numel() * self._memory.element_size()

    def shape_for(self, rows: int, capacity: int) -> None:
        """Views the store as `rows` sequences of up to `capacity` tokens; earlier contents become meaningless."""
        if rows * capacity > self.slots:
            raise UserError(
                f"{rows} sequences of {capacity} tokens need {rows * capacity} cache slots, but the plan has "
                f"{self.slots}; plan for a larger workload."
            )
        layers = self._memory.shape[0]
        used = self._memory[:, :, : rows * capacity * self.kv_heads * self.head_dim]
        self._view = used.view(layers, 2, rows, self.kv_heads, capacity, self.head_dim)

    def clear(self) -> None:
        """Forgets all contents. Masked positions count with weight 0, which a NaN left there would survive."""
        self._memory.zero_()

    def prefill(self, start: int, stop: int) -> PrefillCache:
        return PrefillCache(self, slice(start, stop))

    def decode(self, start: int, stop: int, positions: torch.Tensor, kv_tokens: int) -> DecodeCache:
        """`positions` [rows]: where each row's new token is stored; attention sees the first `kv_tokens`."""
        rows = torch.arange(stop - start, device=positions.device)
        return DecodeCache(self, slice(start, stop), rows, positions, kv_tokens)

    def layer(self, layer_idx: int) -> torch.Tensor:
        """[2, rows, kv_heads, capacity, head_dim] of a decoder layer, by its index in the whole model."""
        return self._view[layer_idx - self.first_layer]


@dataclass
class PrefillCache:
    """Stores whole prompts from position 0 on; attention uses the fresh keys and values."""

    store: KVStore
    rows: slice

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = key.shape[2]
        cached = self.store.layer(layer_idx)
        cached[0, self.rows, :, :tokens] = key
        cached[1, self.rows, :, :tokens] = value
        return key, value


@dataclass
class DecodeCache:
    """Stores one token a row at that row's own position; attention uses all stored tokens."""

    store: KVStore
    rows: slice
    row_index: torch.Tensor
    positions: torch.Tensor
    kv_tokens: int

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.store.layer(layer_idx)[:, self.rows]
        keys[self.row_index, :, self.positions] = key[:, :, 0]
        values[self.row_index, :, self.positions] = value[:, :, 0]
        return keys[:, :, : self.kv_tokens], values[:, :, : self.kv_tokens]
