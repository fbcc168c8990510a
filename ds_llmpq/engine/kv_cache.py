"""Static key/value store of one stage: allocated once, viewed anew for each shape of slots, cut into micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.errors import UserError
from ds_llmpq.integers import round_up


class KVStore:
    """Keys and values of a stage's decoder layers for all sequences in flight.

    The memory holds `positions` tokens a layer; `shape_for(slots, capacity)` views it as slots x capacity, so few long
    sequences and many short ones use the same bytes. A decode micro-batch is a slice of slots: regrouping sequences
    from prefill to decode copies nothing, and a slot's next sequence overwrites the last one's.

    block: slots take whole blocks of so many positions. A stage that runs as one graph (`paged`) lays the same memory
    out as blocks (`blocks`), and no layer of it asks for the other view (`layer`). The last positions may hold a prefix
    that sequences share (`hold_prefix`), which a slot takes over by copying.
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
        block: int = 1,
        paged: bool = False,
    ):
        self.block = block
        self.paged = paged
        self.prefix_tokens = 0
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

    @property
    def device(self) -> torch.device:
        return self._memory.device

    def like(self, positions: int) -> KVStore:
        """A store of the same layers for one sequence of `positions` tokens, in whole blocks."""
        return KVStore(
            self.first_layer, len(self._memory), round_up(positions, self.block), self.kv_heads, self.head_dim,
            self._memory.dtype, self.device, self.block, self.paged,
        )  # fmt: skip

    @property
    def memory(self) -> torch.Tensor:
        """All of it, [layers, 2, elements], whatever the shape of slots."""
        return self._memory

    def over(self, memory: torch.Tensor) -> KVStore:
        """The store, in the same shape, on other memory of the same size."""
        other = copy.copy(self)
        other._memory = memory
        other.shape_for(self.slots, self.capacity)
        return other

    def shape_for(self, slots: int, capacity: int) -> None:
        """Views the store as `slots` sequences of up to `capacity` tokens, in whole blocks; earlier contents become
        meaningless, but for the prefix."""
        capacity = round_up(capacity, self.block)
        free = self.positions - self.prefix_tokens
        if slots * capacity > free:
            raise UserError(
                f"{slots} sequences of {capacity} tokens need {slots * capacity} cache positions, but the plan has "
                f"{free}; plan for a larger workload."
            )
        layers = self._memory.shape[0]
        used = self._positions(0, slots * capacity)
        self._view = used.view(layers, 2, slots, self.kv_heads, capacity, self.head_dim)
        self.slots, self.capacity = slots, capacity

    def clear(self, slot: int | None = None) -> None:
        """Forgets a slot's contents, or all. Masked positions count with weight 0, which a NaN left there would
        survive."""
        if slot is None:
            self._positions(0, self.positions - self.prefix_tokens).zero_()
        else:
            self._view[:, :, slot].zero_()

    def hold_prefix(self, tokens: int) -> None:
        """Keeps the first `tokens` positions of the only slot, which must be whole blocks, until it is called again;
        with 0, none."""
        if tokens + self.capacity > self.positions:
            raise ValueError(f"no room for {tokens} positions beside {self.capacity} of {self.positions}")
        if tokens:
            self._prefix(tokens).copy_(self._front(0, tokens))
        self.prefix_tokens = tokens

    def copy_prefix(self, slots: Sequence[int]) -> None:
        """The slots begin with the prefix."""
        for slot in slots:
            self._front(slot, self.prefix_tokens).copy_(self._prefix(self.prefix_tokens))

    def _prefix(self, tokens: int) -> torch.Tensor:
        """In the form of `_front`."""
        held = self._positions(self.positions - tokens, self.positions)
        return held if self.paged else held.view(*held.shape[:2], self.kv_heads, tokens, self.head_dim)

    def _front(self, slot: int, tokens: int) -> torch.Tensor:
        """A slot's first positions: whole blocks, one behind another, or [layers, 2, kv_heads, tokens, head_dim]."""
        if self.paged:
            return self._positions(slot * self.capacity, slot * self.capacity + tokens)
        return self._view[:, :, slot, :, :tokens]

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        """The memory of so many positions, [layers, 2, elements]."""
        elements = self.kv_heads * self.head_dim
        return self._memory[:, :, start * elements : stop * elements]

    def prefill(self, slots: Sequence[int], past: int = 0) -> PrefillCache:
        """past: tokens that each of the slots holds already."""
        first, last = slots[0], slots[-1]
        together = last - first + 1 == len(slots)
        return PrefillCache(self, slice(first, last + 1) if together else to_device(slots, self._view.device), past)

    def decode(self, start: int, stop: int, positions: torch.Tensor, kv_tokens: int) -> DecodeCache:
        """`positions` [slots]: where each new token is stored; attention sees the first `kv_tokens`."""
        return DecodeCache(self, slice(start, stop), positions, kv_tokens)

    def layer(self, layer_idx: int) -> torch.Tensor:
        """[2, slots, kv_heads, capacity, head_dim] of a decoder layer, by its index in the whole model."""
        return self._view[layer_idx - self.first_layer]

    def blocks(self, layer_idx: int) -> torch.Tensor:
        """[2, blocks, kv_heads, block, head_dim] of a decoder layer, whatever the shape of slots."""
        memory = self._memory[layer_idx - self.first_layer]
        count = self.positions // self.block
        used = memory[:, : count * self.block * self.kv_heads * self.head_dim]
        return used.view(2, count, self.kv_heads, self.block, self.head_dim)

    @property
    def blocks_of_slot(self) -> int:
        return self.capacity // self.block


class NoCache:
    """In the place of a `KVStore` where nothing is generated: attention sees the tokens of its own pass alone."""

    allocated_bytes = 0

    def __init__(self, device: torch.device):
        self.device = device

    def like(self, positions: int) -> NoCache:
        return self

    def shape_for(self, slots: int, capacity: int) -> None:
        """Any shape will do."""

    def clear(self, slot: int | None = None) -> None:
        """Nothing is kept."""

    def hold_prefix(self, tokens: int) -> None:
        """Nothing is kept."""

    def prefill(self, slots: Sequence[int], past: int = 0) -> None:
        return None

    def decode(self, start: int, stop: int, positions: torch.Tensor, kv_tokens: int) -> None:
        return None


@dataclass
class PrefillCache:
    """Stores prompts from position `past` on; attention uses the fresh keys and values, and those before them."""

    store: KVStore
    slots: slice | torch.Tensor
    past: int = 0

    def rows(self, start: int, stop: int) -> PrefillCache:
        if isinstance(self.slots, slice):
            return PrefillCache(self.store, slice(self.slots.start + start, self.slots.start + stop), self.past)
        return PrefillCache(self.store, self.slots[start:stop], self.past)

    def row_places(self) -> list[tuple[int, int]]:
        """(slot, tokens it holds already) of each row."""
        slots = self.slots
        numbers = range(slots.start, slots.stop) if isinstance(slots, slice) else slots.tolist()
        return [(slot, self.past) for slot in numbers]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.past + key.shape[2]
        cached = self.store.layer(layer_idx)
        for part, fresh in zip(cached, (key, value), strict=True):
            if isinstance(self.slots, slice):
                part[self.slots, :, self.past : seen] = fresh
            else:
                part[:, :, self.past : seen].index_copy_(0, self.slots, fresh)
        if not self.past:
            return key, value
        keys, values = cached[:, self.slots, :, :seen]
        return keys, values


@dataclass
class DecodeCache:
    """Stores one token a row at that row's own position; attention uses all stored tokens.

    positions [slots]: each row's own.
    """

    store: KVStore
    slots: slice
    positions: torch.Tensor
    kv_tokens: int

    def rows(self, start: int, stop: int) -> DecodeCache:
        slots = slice(self.slots.start + start, self.slots.start + stop)
        return DecodeCache(self.store, slots, self.positions[start:stop], self.kv_tokens)

    def row_places(self) -> list[tuple[int, int]]:
        """(slot, tokens it holds already) of each row."""
        return list(zip(range(self.slots.start, self.slots.stop), self.positions.tolist(), strict=True))

    @cached_property
    def _places(self) -> torch.Tensor:
        """[slots, kv_heads]: where each head's vector goes, counted in vectors of all slots, heads and positions."""
        heads, store = self.store.kv_heads, self.store
        numbers = torch.arange(self.slots.start * heads, self.slots.stop * heads, device=self.positions.device)
        return numbers.view(-1, heads) * store.capacity + self.positions[:, None]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        places, cached = self._places.view(-1), self.store.layer(layer_idx)
        for part, fresh in zip(cached, (key, value), strict=True):
            part.view(-1, self.store.head_dim).index_copy_(0, places, fresh.reshape(-1, self.store.head_dim))
        keys, values = cached[:, self.slots, :, : self.kv_tokens]
        return keys, values
