"""Captured decode passes as planning sees them: the shapes that are met, and what memory their graphs take."""

from __future__ import annotations

MOST_GRAPHS = 256  # of a stage; the one that was used longest ago goes first
_LEAST_CONTEXT = 128
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


def count_shapes(slots: int, decode_rows: int, capacity: int, shares: bool = False) -> int:
    """How many graphs a stage may come to hold: for each decode group, powers of two of its rows, and buckets of a
    context of up to `capacity` tokens. `shares`: there is a prefix, which the rows of a pass may have or not."""
    contexts = len({context_bucket(tokens, capacity) for tokens in range(1, capacity + 1)})
    groups = -(-slots // decode_rows)
    rows = 1 + (min(decode_rows, slots) - 1).bit_length()
    return min(MOST_GRAPHS, groups * rows * contexts * (2 if shares else 1))


def estimate_graph_bytes(layers: int, slots: int, decode_rows: int, capacity: int, shares: bool = False) -> int:
    """What the driver keeps for the graphs of a stage of `layers` decoder layers, beside the memory that a pass works
    in (`MemoryModel.captured_pool_bytes`): GRAPH_LAYER_BYTES x layers x `count_shapes`."""
    return GRAPH_LAYER_BYTES * layers * count_shapes(slots, decode_rows, capacity, shares)
