"""Shapes of captured decode passes, and the memory that a plan sets aside for them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.cost.captured_graphs import (
    GRAPH_LAYER_BYTES,
    MOST_GRAPHS,
    context_bucket,
    count_paged_shapes,
    count_shapes,
    estimate_graph_bytes,
    row_bucket,
)
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits
from ds_llmpq.scheduler.scheduler import Scheduler


@pytest.mark.parametrize(
    ("kv_tokens", "bucket"), [(1, 128), (128, 128), (129, 192), (193, 256), (257, 384), (385, 512), (2000, 2048)]
)
def test_contexts_go_by_buckets(kv_tokens, bucket):
    assert context_bucket(kv_tokens, 1 << 20) == bucket
    assert context_bucket(kv_tokens, kv_tokens + 1) <= kv_tokens + 1


@pytest.mark.parametrize(
    ("slots", "rows", "capacity", "count"),
    [(64, 64, 4096, 7 * 11), (1, 1, 100, 1), (48, 48, 192, 7 * 2), (64, 32, 128, 2 * 6), (4096, 8, 4096, MOST_GRAPHS)],
)
def test_shapes_by_hand(slots, rows, capacity, count):
    assert count_shapes(slots, rows, capacity) == count
    assert estimate_graph_bytes(3, slots, rows, capacity) == 3 * count * GRAPH_LAYER_BYTES
    assert count_shapes(slots, rows, capacity, shares=True) == min(MOST_GRAPHS, 2 * count)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 20)), min_size=1, max_size=30), st.integers(1, 20),
       st.integers(1, 20))  # fmt: skip
def test_no_stream_meets_more_shapes(lengths, slots, rows):
    """Whatever the scheduler comes to."""
    scheduler = Scheduler(slots, MicroBatchLimits(4, 1000, rows, row_buckets=True))
    scheduler.add(prompt for prompt, _ in lengths)
    left, places, met = [0] * slots, [0] * slots, set()
    capacity = max(map(sum, lengths))
    while scheduler.next_group() is not None:
        for batch in scheduler.schedule(lambda slot: left[slot] <= 0):
            for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
                places[slot], left[slot] = lengths[sequence]
            if batch.phase == "decode":
                seen = max(places[slot] for slot in batch.live) + 1
                met.add((batch.slots[0], batch.size, context_bucket(seen, capacity)))
                for slot in batch.live:
                    places[slot] += 1
            for slot in batch.live:
                left[slot] -= 1
    assert len(met) <= count_shapes(slots, rows, capacity)


@pytest.mark.parametrize(("slots", "rows", "count"), [(1, 1, 1), (5, 5, 4), (32, 32, 6), (100, 100, 9), (512, 256, 13)])
def test_passes_over_shared_blocks_go_by_rows_alone(slots, rows, count):
    assert count_paged_shapes(slots, rows) == count
    met = {min(row_bucket(taken), slots) for taken in range(1, rows + 1)}
    assert len(met) == count
    assert all(bucket >= taken for taken in range(1, rows + 1) if (bucket := row_bucket(taken)) <= slots)
    graphs = estimate_graph_bytes(3, slots, rows, 4096, paged=True)
    assert graphs == 3 * count * GRAPH_LAYER_BYTES < estimate_graph_bytes(3, slots, rows, 4096)
    limits = MicroBatchLimits(1, 1, rows, row_buckets=True, cache_blocks=9, block_tokens=32)
    batch = MicroBatch(0, "decode", tuple(range(rows)), tuple(range(rows)))
    assert limits.count_rows(batch, slots) == min(row_bucket(rows), slots)
    assert limits.count_rows(replace(batch, phase="prefill"), slots) == rows
    assert replace(limits, cache_blocks=0).count_rows(batch, slots) == rows
