"""The key/value store of a stage whose rows share its blocks, each holding what its tokens need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.models.block import Attention

if TYPE_CHECKING:  # it imports torch's compiler
    from ds_llmpq.engine.runner.flex_pages import FlexPages

# of a pass's rows: slot, tokens stored already, those of them that are the prefix's
Places = list[tuple[int, int, int]]


class PagedKVStore(KVStore):
    """`tables[slot]`: the blocks of the slot's row, in the order of its tokens, as the stream's `BlockPool` has them;
    its numbers begin behind a shared prefix. Slots are names of rows and have no place of their own.

    A stage that is one graph lays the memory out in blocks of heads (`blocks`), another token by token (`pages`).
    """

    tables: Sequence[Sequence[int]] = ()

    def shape_for(self, slots: int, capacity: int) -> None:
        """Any number of slots; a row may take all there is."""
        self.slots = slots
        self.capacity = (self.positions - self.prefix_tokens) // self.block * self.block
        self._arrays = TableArrays()

    def hold_prefix(self, tokens: int) -> None:
        """The first blocks, which a fresh pool gave to the only row, are the prefix, until it is called again."""
        self.prefix_tokens = tokens
        self.shape_for(1, tokens)

    def clear_blocks(self, blocks: Iterable[int]) -> None:
        """Forgets what they hold, by their numbers in the pool."""
        for block in blocks:
            start = self.prefix_tokens + block * self.block
            self._positions(start, start + self.block).zero_()

    def pages(self, layer_idx: int) -> torch.Tensor:
        """[2, positions, kv_heads, head_dim] of a decoder layer."""
        memory = self._memory[layer_idx - self.first_layer]
        return memory.view(2, self.positions, self.kv_heads, self.head_dim)

    def gather(self, layer_idx: int, tables: torch.Tensor, tokens: int) -> torch.Tensor:
        """Copies of rows' first `tokens` keys and values, [2, rows, kv_heads, tokens, head_dim], by the blocks in
        `tables` [rows, blocks]."""
        size = self.kv_heads, self.head_dim
        pages = self.pages(layer_idx)[:, : self.positions // self.block * self.block].view(2, -1, self.block, *size)
        found = pages.index_select(1, tables.reshape(-1)).view(2, len(tables), -1, *size)
        return found[:, :, :tokens].transpose(2, 3)

    def prefill(self, slots: Sequence[int], past: int = 0, shared: int = 0) -> PagedPrefill:
        return PagedPrefill(self, [(slot, past, shared) for slot in slots])

    def decode_rows(
        self, slots: Sequence[int], positions: Sequence[int], shared: Sequence[int], at: torch.Tensor
    ) -> PagedDecode:
        """`positions`: of each row's new token, of which `shared` are the prefix's; `at` [rows]: the same, on the
        device."""
        return PagedDecode(self, list(zip(slots, positions, shared, strict=True)), at, max(positions) + 1)

    def block_table(self, slot: int, tokens: int, shared: int) -> list[int]:
        first, own = self.prefix_tokens // self.block, -(-(tokens - shared) // self.block)
        table = self.tables[slot][:own]
        if len(table) < own:
            raise ValueError(f"{tokens - shared} tokens of slot {slot} need {own} blocks, but it has {len(table)}")
        return [*range(shared // self.block), *(first + block for block in table)]

    def tabulate(self, places: Places, tokens: int) -> np.ndarray:
        """[rows, blocks] of the rows' first `tokens` positions. Where a row has fewer blocks its first one stands
        again, which holds numbers."""
        return self._arrays.select(self, places, -(-tokens // self.block))


class TableArrays:
    """The block tables of all slots as one array, to which what rows have taken since is added when it is asked for."""

    def __init__(self) -> None:
        self._array = np.zeros((0, 0), np.int32)
        self._seen: list[tuple[Sequence[int] | None, int]] = []  # each slot's list, and how much of it is there

    def select(self, store: PagedKVStore, places: Places, width: int) -> np.ndarray:
        """[rows, width]."""
        slots = [slot for slot, _, _ in places]
        self._grow(len(store.tables), width)
        for slot, _, shared in places:
            self._fill(slot, store.tables[slot], shared // store.block, store.prefix_tokens // store.block)
        return self._array[slots, :width]

    def _grow(self, slots: int, width: int) -> None:
        rows, columns = self._array.shape
        if slots <= rows and width <= columns:
            return
        larger = np.zeros((max(slots, rows), max(2 * width, columns)), np.int32)
        larger[:rows, :columns] = self._array
        self._array, self._seen = larger, [(None, 0)] * len(larger)

    def _fill(self, slot: int, table: Sequence[int], shared: int, first: int) -> None:
        """A list is a row's as long as it holds its slot, and only grows. `shared`: blocks of the prefix; `first`: the
        number behind its last one."""
        known, count = self._seen[slot]
        row = self._array[slot]
        if known is not table:
            row[:] = 0 if shared or not table else first + table[0]
            row[:shared] = range(shared)
            count = 0
        if count < len(table):
            fresh = [first + block for block in table[count : len(row) - shared]]
            row[shared + count : shared + count + len(fresh)] = fresh
        self._seen[slot] = table, len(table)


@dataclass
class PagedRows:
    """The rows of a pass, which know where they stand: all that a stage needs that is one graph."""

    store: KVStore
    places: Places
    in_place = False

    def rows(self, start: int, stop: int) -> PagedRows:
        return replace(self, places=self.places[start:stop])

    def row_places(self) -> Places:
        return self.places


@dataclass
class PagedPrefill(PagedRows):
    """Stores prompts from where they are not stored yet, the same for all rows. Attention uses the fresh keys and
    values, and copies of those before them: prefill computes so much that the copy costs little."""

    store: PagedKVStore
    _tensors: Sequence[torch.Tensor] = ()

    def rows(self, start: int, stop: int) -> PagedPrefill:
        return PagedPrefill(self.store, self.places[start:stop])

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        past, tokens = self.places[0][1], key.shape[2]
        self._tensors = self._tensors or [to_device(part, key.device) for part in self._tabulate(past, tokens)]
        tables, kept, stored = self._tensors
        for part, fresh in zip(self.store.pages(layer_idx), (key, value), strict=True):
            by_token = fresh.transpose(1, 2).flatten(0, 1)
            part.index_copy_(0, stored, by_token.index_select(0, kept))
        if past:
            key, value = self.store.gather(layer_idx, tables, past + tokens)
        return key, value

    def _tabulate(self, past: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows' tables; which of their new tokens, counted over all rows, have a block, for padding may have none;
        and the positions that those take in the store."""
        store, block = self.store, self.store.block
        tables = store.tabulate(self.places, past + tokens)
        at = np.arange(past, past + tokens)
        held = np.array([shared // block + len(store.tables[slot]) for slot, _, shared in self.places])
        stored = tables[:, at // block].astype(np.int64) * block + at % block
        kept = (at // block < held[:, None]).reshape(-1)
        return tables, kept.nonzero()[0], stored.reshape(-1)[kept]


@dataclass
class PagedDecode(PagedRows):
    """Stores one token a row at that row's own position, `at` [rows]; attention sees the first `tokens` positions."""

    store: PagedKVStore
    at: torch.Tensor
    tokens: int

    def rows(self, start: int, stop: int) -> PagedDecode:
        return replace(self, places=self.places[start:stop], at=self.at[start:stop])

    def tabulate(self, tokens: int) -> torch.Tensor:
        """[rows, blocks] of the first `tokens` positions, on the device."""
        return to_device(self.store.tabulate(self.places, tokens), self.at.device)

    @cached_property
    def pages(self) -> PageTables:
        return PageTables(self.store, self.tabulate(self.tokens), self.at, self.tokens)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pages.update(key, value, layer_idx)


class PageRange(NamedTuple):
    """What the rows of a decode pass read of the store: `blocks` [rows, blocks], of which each row reads its first
    `counts` [rows]; in these nothing of places between `newest` and `end`, and between `begin` and `oldest` [rows]
    each, the latter None where a row reads from its first token on. `order` [blocks of the store, 1 more]: of each
    block, how many of the row's lie before it."""

    blocks: torch.Tensor
    counts: torch.Tensor
    newest: torch.Tensor
    end: torch.Tensor
    begin: torch.Tensor | None
    oldest: torch.Tensor | None
    order: torch.Tensor


@dataclass
class PageTables:
    """A decode pass over pages by tensors alone: the rows' blocks, `tables` [rows, blocks], and the positions `at`
    [rows] of their new tokens. `flex` reads pages in place; without it attention sees copies of the first `tokens`
    positions of each row."""

    store: PagedKVStore
    tables: torch.Tensor
    at: torch.Tensor
    tokens: int
    flex: FlexPages | None = None
    _ranges: dict[int | None, PageRange] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        return self.flex is not None

    @cached_property
    def stored(self) -> torch.Tensor:
        """[rows]: where the new tokens go, counted in positions of the store."""
        block = self.store.block
        return self.tables.gather(1, (self.at // block)[:, None])[:, 0].long() * block + self.at % block

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.write(key, value, layer_idx)
        keys, values = self.store.gather(layer_idx, self.tables, self.tokens)
        return keys, values

    def write(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> None:
        """Those of one token a row, [rows, kv_heads, 1, head_dim]."""
        for part, fresh in zip(self.store.pages(layer_idx), (key, value), strict=True):
            part.index_copy_(0, self.stored, fresh[:, :, 0])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: Attention) -> torch.Tensor:
        """Stores the new tokens, and gives what attention finds, [rows, heads, 1, head_dim]."""
        self.write(key, value, layer.index)
        return self.flex.attend(query, self, layer.index, layer.window)

    def find_range(self, window: int | None) -> PageRange:
        """Layers of a pass share it."""
        if window not in self._ranges:
            self._ranges[window] = self._find_range(window)
        return self._ranges[window]

    def _find_range(self, window: int | None) -> PageRange:
        block, width = self.store.block, self.tables.shape[1]
        columns = torch.arange(width, device=self.at.device)
        blocks, last, begin, oldest = self.tables, self.at // block, None, None
        skipped = torch.zeros_like(last)
        if window is not None:
            first = (self.at - window + 1).clamp_min(0)
            skipped = first // block
            blocks = blocks.gather(1, (skipped[:, None] + columns).clamp_max(width - 1))
            begin = blocks[:, 0] * block
            oldest = (begin + first % block).int()
        counts = (last - skipped + 1).int()
        end = self.stored - self.at % block + block
        # a row's table is longer than what it reads
        used = torch.where(columns < counts[:, None], blocks, self.store.positions // block).long()
        order = torch.zeros(self.store.positions // block + 1, dtype=torch.int32, device=self.at.device)
        before = (skipped[:, None] + columns).int()
        order.scatter_(0, used.flatten(), before.flatten())
        return PageRange(blocks, counts, self.stored.int(), end.int(), begin, oldest, order)
