"""Attention of decode passes that reads the pages of the KV cache in place, as FlexAttention of torch, compiled.

A `BlockMask` names the blocks that a query reads. What it hides within them is known by place alone: of a row's last
block what lies behind its newest token, of its first one what a window does not reach. So no block is looked up key by
key but for ALiBi, whose bias wants the key's position.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ds_llmpq.cost.captured_graphs import LEAST_TABLE_TOKENS
from ds_llmpq.engine.paged_cache import PagedKVStore, PageRange, PageTables
from ds_llmpq.engine.runner.fusion import allow_versions
from ds_llmpq.models.ends import compute_alibi_slopes
from ds_llmpq.models.spec import DecoderSpec

_QUERY_BLOCK = 128  # queries of a block of the mask
_VERSIONS = 256  # compiled ones that there may be: for each number of rows and kind of layer; torch allows 8


class FlexPages:
    """Of a stage of layers as `spec` has them. Each number of rows is compiled when it is first met.

    compile_seconds: what `check` took.
    """

    def __init__(self, spec: DecoderSpec, device: torch.device):
        self.spec = spec
        self.compile_seconds = 0.0
        attention = spec.attention
        slopes = torch.tensor(compute_alibi_slopes(attention.heads), device=device) if attention.alibi else None
        self._slopes = slopes
        self._attend = torch.compile(attend_in_place, fullgraph=True, dynamic=False)
        allow_versions(_VERSIONS)

    def attend(self, query: torch.Tensor, pages: PageTables, layer_idx: int, window: int | None) -> torch.Tensor:
        """query [rows, heads, 1, head_dim] -> the same shape."""
        keys, values = pages.store.pages(layer_idx)
        attention = self.spec.attention
        by_group = query.reshape(len(query), attention.kv_heads, -1, query.shape[-1])
        found = self._attend(
            by_group, keys, values, pages.find_range(window), self._slopes, attention.scale, attention.soft_cap,
            pages.store.block,
        )  # fmt: skip
        return found.reshape(query.shape)

    def check(self, store: PagedKVStore, rows: int, tell: Callable[[str], None]) -> bool:
        """Compiles for so many rows, of each kind of layer; False, and `tell` gets a line, where that fails."""
        began, attention, device = time.monotonic(), self.spec.attention, store.device
        try:
            with torch.inference_mode():
                # laid out as in passes, which the compiler looks at
                at = torch.zeros(rows, dtype=torch.long, device=device)
                tables = torch.zeros(rows, LEAST_TABLE_TOKENS // store.block, dtype=torch.int32, device=device)
                query = torch.zeros(rows, attention.heads, 1, store.head_dim, dtype=store.memory.dtype, device=device)
                for window in {layer.window for layer in self.spec.layers}:
                    self.attend(query, PageTables(store, tables, at, 0), store.first_layer, window)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            tell(
                f"attention copies the pages of the KV cache in every pass, which is slower, for reading them in place "
                f"does not compile ({type(error).__name__}: {said[0][:200]})"
            )
            return False
        self.compile_seconds = time.monotonic() - began
        return True


def attend_in_place(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, found: PageRange, slopes: torch.Tensor | None,
    scale: float, soft_cap: float | None, block: int,
) -> torch.Tensor:  # fmt: skip
    """query [R, G, H / G, D] over keys and values [positions, G, D] of all rows -> the same shape. Letters as in
    `models.block`. The heads of a group see the same keys: as queries of one head they are in torch's kernel for few
    queries, which otherwise takes groups of a power of two alone."""
    heads = query.shape[2]
    blocks, counts, newest, end, begin, oldest, order = found

    def mask(row, head, token, place):
        seen = (place <= newest[row]) | (place >= end[row])
        return seen if begin is None else seen & ((place >= oldest[row]) | (place < begin[row]))

    def score(value, row, head, token, place):
        if soft_cap is not None:
            value = soft_cap * torch.tanh(value / soft_cap)
        if slopes is not None:
            value = value + slopes[head * heads + token] * (order[place // block] * block + place % block)
        return value

    pages = BlockMask.from_kv_blocks(
        counts[:, None, None], blocks[:, None, None], BLOCK_SIZE=(_QUERY_BLOCK, block), mask_mod=mask,
        seq_lengths=(heads, len(keys)), compute_q_blocks=False,
    )  # fmt: skip
    plain = soft_cap is None and slopes is None
    by_head = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    return flex_attention(query, *by_head, None if plain else score, pages, scale=scale)
