"""Static key/value store of one stage: allocated once, viewed anew for each shape of slots, cut into micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

import torch

from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.errors import UserError
from ds_llmpq.integers import round_up
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS


class KVStore:
    """Keys and values of a stage's decoder layers for all sequences in flight.

    The memory holds `positions` tokens a layer; `shape_for(slots, capacity)` views it as slots x capacity, so few long
    sequences and many short ones use the same bytes. A decode micro-batch is a slice of slots: regrouping sequences
    from prefill to decode copies nothing, and a slot's next sequence overwrites the last one's.

    block: slots take whole blocks of so many positions. A stage that runs as one graph lays the same memory out as
    blocks (`blocks`), and no layer of it asks for the other view (`layer`). The first positions may hold a prefix that
    sequences share (`hold_prefix`); the slots lie behind it, and a slot whose sequence shares it holds what follows.
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
    ):
        self.block = block
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
            self._memory.dtype, self.device, self.block,
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
        used = self._positions(self.prefix_tokens, self.prefix_tokens + slots * capacity)
        self._view = used.view(layers, 2, slots, self.kv_heads, capacity, self.head_dim)
        self.slots, self.capacity = slots, capacity

    def clear(self, slot: int | None = None) -> None:
        """Forgets a slot's contents, or all. Masked positions count with weight 0, which a NaN left there would
        survive."""
        if slot is None:
            self._positions(self.prefix_tokens, self.positions).zero_()
        else:
            self._view[:, :, slot].zero_()

    def hold_prefix(self, tokens: int) -> None:
        """Makes the only slot, which is full with `tokens`, the prefix, until it is called again; with 0, there is
        none. The rest is one slot."""
        if tokens and (self.slots, self.capacity) != (1, tokens):
            raise ValueError(
                f"{tokens} positions of {self.slots} slots of {self.capacity}; a prefix fills a slot alone"
            )
        self.prefix_tokens = tokens
        self.shape_for(1, (self.positions - tokens) // self.block * self.block)

    def prefix(self, layer_idx: int) -> torch.Tensor:
        """[2, kv_heads, prefix tokens, head_dim] of a decoder layer."""
        held = self._positions(0, self.prefix_tokens)[layer_idx - self.first_layer]
        return held.view(2, self.kv_heads, self.prefix_tokens, self.head_dim)

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        """The memory of so many positions, [layers, 2, elements]."""
        elements = self.kv_heads * self.head_dim
        return self._memory[:, :, start * elements : stop * elements]

    def prefill(self, slots: Sequence[int], past: int = 0, shared: int = 0) -> PrefillCache:
        """past: tokens of each sequence that are stored already, of which `shared` are the prefix's."""
        first, last = slots[0], slots[-1]
        rows = slice(first, last + 1) if last - first + 1 == len(slots) else to_device(slots, self._view.device)
        return PrefillCache(self, rows, past, shared)

    def decode(
        self, start: int, stop: int, positions: torch.Tensor, kv_tokens: int, shared: torch.Tensor | None = None
    ) -> DecodeCache:
        """`positions` [slots]: of each new token in its sequence, of which `shared` [slots] are the prefix's; attention
        sees the first `kv_tokens` of each slot."""
        return DecodeCache(self, slice(start, stop), positions, kv_tokens, shared)

    def decode_slots(
        self, slots: Sequence[int], positions: torch.Tensor, kv_tokens: int, shared: torch.Tensor | None = None
    ) -> DecodeCache:
        """The same for `slots` that follow one another."""
        return self.decode(slots[0], slots[-1] + 1, positions, kv_tokens, shared)

    def layer(self, layer_idx: int) -> torch.Tensor:
        """[2, slots, kv_heads, capacity, head_dim] of a decoder layer, by its index in the whole model."""
        return self._view[layer_idx - self.first_layer]

    def blocks(self, layer_idx: int) -> torch.Tensor:
        """[2, blocks, kv_heads, block, head_dim] of a decoder layer, whatever the shape of slots."""
        memory = self._memory[layer_idx - self.first_layer]
        count = self.positions // self.block
        used = memory[:, : count * self.block * self.kv_heads * self.head_dim]
        return used.view(2, count, self.kv_heads, self.block, self.head_dim)

    def block_table(self, slot: int, tokens: int, shared: int) -> list[int]:
        """The blocks of a sequence's first `tokens` positions, of which `shared` are the prefix's."""
        first = (self.prefix_tokens + slot * self.capacity) // self.block
        return [*range(shared // self.block), *range(first, first - (shared - tokens) // self.block)]


def choose_elements(kernel: Kernel, head_dim: int, dtype: torch.dtype, kv_bits: int) -> tuple[int, torch.dtype]:
    """How many elements a head's key or value has in a kernel's cache of so many bits, and of which dtype."""
    if kv_bits == UNQUANTIZED_BITS:
        return head_dim, dtype
    return kernel.kv_vector_bytes(head_dim, kv_bits, dtype.itemsize), torch.uint8


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

    def prefill(self, slots: Sequence[int], past: int = 0, shared: int = 0) -> None:
        return None

    def decode_slots(
        self, slots: Sequence[int], positions: torch.Tensor, kv_tokens: int, shared: torch.Tensor | None = None
    ) -> None:
        return None


@dataclass
class PrefillCache:
    """Stores prompts from position `past` on; attention uses the fresh keys and values, and those before them. Behind a
    shared prefix they are joined for the pass: prefill computes so much that the copy costs little."""

    store: KVStore
    slots: slice | torch.Tensor
    past: int = 0
    shared: int = 0
    in_place = False

    def rows(self, start: int, stop: int) -> PrefillCache:
        if isinstance(self.slots, slice):
            return replace(self, slots=slice(self.slots.start + start, self.slots.start + stop))
        return replace(self, slots=self.slots[start:stop])

    def row_places(self) -> list[tuple[int, int, int]]:
        """(slot, tokens stored already, those of them that are the prefix's) of each row."""
        slots = self.slots
        numbers = range(slots.start, slots.stop) if isinstance(slots, slice) else slots.tolist()
        return [(slot, self.past, self.shared) for slot in numbers]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.past - self.shared
        seen = place + key.shape[2]
        cached = self.store.layer(layer_idx)
        for part, fresh in zip(cached, (key, value), strict=True):
            if isinstance(self.slots, slice):
                part[self.slots, :, place:seen] = fresh
            else:
                part[:, :, place:seen].index_copy_(0, self.slots, fresh)
        if place:
            key, value = cached[:, self.slots, :, :seen]
        if self.shared:
            prefix = self.store.prefix(layer_idx)[:, None].expand(-1, len(key), -1, -1, -1)
            key, value = (torch.cat(parts, 2) for parts in zip(prefix, (key, value), strict=True))
        return key, value


@dataclass
class DecodeCache:
    """Stores one token a row at that row's own position; attention uses all stored tokens of the slots, and apart from
    them the prefix (`prefix`).

    positions [slots]: each row's own; `shared` [slots]: those of them that are the prefix's, None: of no row.
    """

    store: KVStore
    slots: slice
    positions: torch.Tensor
    kv_tokens: int
    shared: torch.Tensor | None = None
    in_place = False

    @property
    def prefix_tokens(self) -> int:
        return self.store.prefix_tokens

    def prefix(self, layer_idx: int) -> torch.Tensor:
        """Keys and values, [2, kv_heads, prefix tokens, head_dim]."""
        return self.store.prefix(layer_idx)

    def rows(self, start: int, stop: int) -> DecodeCache:
        slots = slice(self.slots.start + start, self.slots.start + stop)
        shared = None if self.shared is None else self.shared[start:stop]
        return replace(self, slots=slots, positions=self.positions[start:stop], shared=shared)

    def row_places(self) -> list[tuple[int, int, int]]:
        """(slot, tokens stored already, those of them that are the prefix's) of each row."""
        shared = repeat(0) if self.shared is None else self.shared.tolist()
        return list(zip(range(self.slots.start, self.slots.stop), self.positions.tolist(), shared, strict=False))

    @cached_property
    def _places(self) -> torch.Tensor:
        """[slots, kv_heads]: where each head's vector goes, counted in vectors of all slots, heads and positions."""
        heads, store = self.store.kv_heads, self.store
        numbers = torch.arange(self.slots.start * heads, self.slots.stop * heads, device=self.positions.device)
        places = self.positions if self.shared is None else self.positions - self.shared
        return numbers.view(-1, heads) * store.capacity + places[:, None]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        places, cached = self._places.view(-1), self.store.layer(layer_idx)
        for part, fresh in zip(cached, (key, value), strict=True):
            part.view(-1, self.store.head_dim).index_copy_(0, places, fresh.reshape(-1, self.store.head_dim))
        keys, values = cached[:, self.slots, :, : self.kv_tokens]
        return keys, values
