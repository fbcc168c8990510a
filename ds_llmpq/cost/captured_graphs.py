"""Captured decode passes as planning sees them: the shapes that are met, and what memory their graphs take."""

from __future__ import annotations

MOST_GRAPHS = 256  # of a stage; the one that was used longest ago goes first
_LEAST_CONTEXT = 128
# what block tables hold at least where attention reads blocks in place; a longer row doubles it
LEAST_TABLE_TOKENS = 2048
_ROW_STEP = 32  # where sequences share cache blocks; below, powers of two
# Estimated, not measured here: what the driver keeps for a graph, a decoder layer. vLLM's logs say 24 to 28 MiB for a
# captured decode pass (its pull request 22897), which is taken for 32 layers. docs/gpu.md: how to measure ours.
GRAPH_LAYER_BYTES = (26 << 20) // 32


def context_bucket(kv_tokens: int, capacity: int) -> int:
    """The context that a graph for `kv_tokens` attends over: the next of 128, 192, 256, 384, 512, 768 ..., so at most
    half as much again; never more than `capacity`."""
    bucket = _LEAST_CONTEXT
    while bucket < kv_tokens:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket // 3 * 4
    return min(bucket, capacity)


def row_bucket(rows: int) -> int:
    """The rows of a captured pass over shared cache blocks, which any slots can be: 1, 2, 4, 8, 16, 32, 64, 96, 128,
    160 ..."""
    return 1 << (rows - 1).bit_length() if rows < _ROW_STEP else -(-rows // _ROW_STEP) * _ROW_STEP


def count_paged_shapes(slots: int, decode_rows: int) -> int:
    """How many graphs a stage may come to hold where sequences share cache blocks, and attention reads them in
    place."""
    return min(MOST_GRAPHS, len({min(row_bucket(rows), slots) for rows in range(1, min(decode_rows, slots) + 1)}))


def count_shapes(slots: int, decode_rows: int, capacity: int, shares: bool = False) -> int:
    """How many graphs a stage may come to hold: for each decode group, powers of two of its rows, and buckets of a
    context of up to `capacity` tokens. `shares`: there is a prefix, which the rows of a pass may have or not."""
    contexts = len({context_bucket(tokens, capacity) for tokens in range(1, capacity + 1)})
    groups = -(-slots // decode_rows)
    rows = 1 + (min(decode_rows, slots) - 1).bit_length()
    return min(MOST_GRAPHS, groups * rows * contexts * (2 if shares else 1))


def estimate_graph_bytes(
    layers: int, slots: int, decode_rows: int, capacity: int, shares: bool = False, paged: bool = False
) -> int:
    """What the driver keeps for the graphs of a stage of `layers` decoder layers, beside the memory that a pass works
    in (`MemoryModel.captured_pool_bytes`): GRAPH_LAYER_BYTES x layers x the number of shapes."""
    shapes = count_paged_shapes(slots, decode_rows) if paged else count_shapes(slots, decode_rows, capacity, shares)
    return GRAPH_LAYER_BYTES * layers * shapes
