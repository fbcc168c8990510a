"""Captured decode passes over a KV cache whose blocks rows share: a graph for each number of rows, whichever they are.

A pass has as many rows as `row_bucket` says. Those that nobody asked for repeat the first one: they compute what it
computes, and store it where it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_llmpq.cost.captured_graphs import LEAST_TABLE_TOKENS, context_bucket, row_bucket
from ds_llmpq.engine.paged_cache import PagedDecode, PageTables
from ds_llmpq.engine.runner.captured_decode import CapturedDecode, Outputs, Shape
from ds_llmpq.models.step import Step

if TYPE_CHECKING:  # it imports torch's compiler
    from ds_llmpq.engine.runner.flex_pages import FlexPages


class CapturedPages(CapturedDecode):
    """`flex`: attention that reads pages in place. None: a graph copies the pages of all rows up to a bucket of the
    longest context, and there is one for each bucket."""

    flex: FlexPages | None = None

    def run(self, step: Step) -> Outputs:
        rows = len(step.positions)
        hidden, logits = super().run(step)
        return hidden[:rows], None if logits is None else logits[:rows]

    def _find_shape(self, step: Step) -> Shape:
        if not isinstance(step.cache, PagedDecode):
            raise TypeError(f"a captured decode pass needs the cache of a decode pass, not {type(step.cache).__name__}")
        store = self.store
        rows = max(len(step.positions), min(row_bucket(len(step.positions)), store.slots))
        if self.flex:
            tokens = max(LEAST_TABLE_TOKENS, 1 << (step.kv_tokens - 1).bit_length())
        else:
            tokens = context_bucket(step.kv_tokens, store.capacity + store.prefix_tokens)
        return Shape(0, rows, tokens, 0, 0, 0, False)

    def _fill_buffers(self, step: Step, shape: Shape) -> None:
        blocks, rows = shape.kv_tokens // self.store.block, len(step.positions)
        if blocks > self._tables.shape[1]:
            self._graphs.clear()
            self._tables = self._tables.new_zeros(len(self._tables), blocks)
        filled = (
            (self._positions, step.positions[:, 0]),
            (self._inputs, step.hidden if self._hidden_size else step.token_ids),
            (self._tables[:, :blocks], step.cache.tabulate(shape.kv_tokens)),
        )
        for buffer, values in filled:
            buffer[:rows].copy_(values, non_blocking=True)
            if rows < shape.rows:
                buffer[rows : shape.rows].copy_(values[:1].expand(shape.rows - rows, *values.shape[1:]))

    def _list_buffers(self, shape: Shape) -> tuple[torch.Tensor, ...]:
        rows, blocks = shape.rows, shape.kv_tokens // self.store.block
        return self._inputs[:rows], self._positions[:rows], self._tables[:rows, :blocks], self.store.memory

    def _step(
        self, shape: Shape, inputs: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor, memory: torch.Tensor
    ) -> Outputs:
        cache = PageTables(self.store.over(memory), tables, positions, shape.kv_tokens, self.flex)
        # what is read in place has no mask
        seen = 0 if self.flex else shape.kv_tokens
        return self._pass(Step(positions[:, None], cache, seen, False, prepare=self.positional), inputs)

    def _make_buffers(self, rows: int) -> None:
        super()._make_buffers(rows)
        self._tables = torch.zeros(len(self._positions), 1, dtype=torch.int32, device=self.store.device)
