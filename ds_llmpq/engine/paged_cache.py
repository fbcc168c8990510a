"""The key/value store of a stage that reads block tables: rows share its blocks, each holding what its tokens need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ds_llmpq.engine.kv_cache import KVStore


class PagedKVStore(KVStore):
    """`tables[slot]`: the blocks of the slot's row, in the order of its tokens, as the stream's `BlockPool` has them;
    its numbers begin behind a shared prefix. Slots are names of rows and have no place of their own."""

    tables: Sequence[Sequence[int]] = ()

    def shape_for(self, slots: int, capacity: int) -> None:
        """Any number of slots; a row may take all there is."""
        self.slots = slots
        self.capacity = (self.positions - self.prefix_tokens) // self.block * self.block

    def hold_prefix(self, tokens: int) -> None:
        """The first blocks, which a fresh pool gave to the only row, are the prefix, until it is called again."""
        self.prefix_tokens = tokens
        self.shape_for(1, tokens)

    def clear_blocks(self, blocks: Iterable[int]) -> None:
        """Forgets what they hold, by their numbers in the pool."""
        for block in blocks:
            start = self.prefix_tokens + block * self.block
            self._positions(start, start + self.block).zero_()

    def prefill(self, slots: Sequence[int], past: int = 0, shared: int = 0) -> PagedRows:
        return PagedRows(self, [(slot, past, shared) for slot in slots])

    def decode_slots(
        self, slots: Sequence[int], positions: torch.Tensor, kv_tokens: int, shared: torch.Tensor | None = None
    ) -> PagedRows:
        of_prefix = [0] * len(slots) if shared is None else shared.tolist()
        return PagedRows(self, list(zip(slots, positions.tolist(), of_prefix, strict=True)))

    def block_table(self, slot: int, tokens: int, shared: int) -> list[int]:
        first, own = self.prefix_tokens // self.block, -(-(tokens - shared) // self.block)
        table = self.tables[slot][:own]
        if len(table) < own:
            raise ValueError(f"{tokens - shared} tokens of slot {slot} need {own} blocks, but it has {len(table)}")
        return [*range(shared // self.block), *(first + block for block in table)]


@dataclass
class PagedRows:
    """Of a pass's rows, (slot, tokens stored already, those of them that are the prefix's)."""

    store: PagedKVStore
    places: list[tuple[int, int, int]]

    def rows(self, start: int, stop: int) -> PagedRows:
        return replace(self, places=self.places[start:stop])

    def row_places(self) -> list[tuple[int, int, int]]:
        return self.places
