"""The key/value store against plain lists of what was put in."""

import random

import pytest
import torch

from ds_llmpq.cost.arithmetic import kv_bytes
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape

HEADS, DIM, FIRST, LAYERS = 2, 4, 4, 2


def make_store(slots, dtype=torch.float32):
    return KVStore(FIRST, LAYERS, slots, HEADS, DIM, dtype, torch.device("cpu"))


def fresh(rows, tokens):
    return torch.randn(rows, HEADS, tokens, DIM), torch.randn(rows, HEADS, tokens, DIM)


def test_random_waves_against_lists():
    """Prefill in some micro-batches, decode in others; each row sees its own tokens at its own places."""
    draw = random.Random(0)
    torch.manual_seed(0)
    store = make_store(200)
    for _ in range(30):
        lengths = [draw.randint(1, 9) for _ in range(draw.randint(1, 7))]
        capacity = max(lengths) + draw.randint(1, 200 // len(lengths) - max(lengths))
        store.shape_for(len(lengths), capacity)
        kept = {}  # (layer, row) -> [(key, value)] by position
        for start in range(0, len(lengths), draw.choice((1, 2, 7))):
            stop = min(len(lengths), start + 7)
            longest = max(lengths[start:stop])
            for layer in range(FIRST, FIRST + LAYERS):
                keys, values = fresh(stop - start, longest)
                seen = store.prefill(range(start, stop)).update(keys, values, layer)
                assert seen[0] is keys
                assert seen[1] is values
                for row in range(start, stop):
                    kept[layer, row] = [
                        (keys[row - start, :, t], values[row - start, :, t]) for t in range(lengths[row])
                    ]
        for _ in range(capacity - max(lengths)):
            start = draw.randrange(len(lengths))
            stop = draw.randint(start + 1, len(lengths))
            positions = torch.tensor([len(kept[FIRST, row]) for row in range(start, stop)])
            cache = store.decode(start, stop, positions, int(positions.max()) + 1)
            for layer in range(FIRST, FIRST + LAYERS):
                keys, values = fresh(stop - start, 1)
                seen = cache.update(keys, values, layer)
                assert seen[0].shape == seen[1].shape == (stop - start, HEADS, int(positions.max()) + 1, DIM)
                for row in range(start, stop):
                    kept[layer, row].append((keys[row - start, :, 0], values[row - start, :, 0]))
                    for position, (key, value) in enumerate(kept[layer, row]):
                        assert torch.equal(seen[0][row - start, :, position], key)
                        assert torch.equal(seen[1][row - start, :, position], value)


def test_allocated_once_and_as_the_cost_model_says():
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": HEADS}
    config |= {"intermediate_size": 8, "num_hidden_layers": 9, "vocab_size": 8}
    shape = ModelShape.from_config(config)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        store = make_store(6 * 7, dtype)
        assert store.allocated_bytes == LAYERS * kv_bytes(shape, 6, 7, size)
        place = store.layer(FIRST).data_ptr()
        store.shape_for(2, 21)
        store.shape_for(42, 1)
        assert store.layer(FIRST).data_ptr() == place
        assert store.layer(FIRST).shape == (2, 42, HEADS, 1, DIM)


def test_more_than_the_slots():
    store = make_store(20)
    store.shape_for(4, 5)
    with pytest.raises(UserError, match="3 sequences of 7 tokens need 21 cache positions, but the plan has 20"):
        store.shape_for(3, 7)


def test_layers_do_not_share_memory_and_clear_forgets_all():
    store = make_store(10)
    store.shape_for(2, 5)
    keys, values = fresh(2, 5)
    store.prefill(range(2)).update(keys, values, FIRST + 1)
    assert (store.layer(FIRST) == 0).all()
    assert torch.equal(store.layer(FIRST + 1)[1], values)
    store.clear()
    assert (store.layer(FIRST + 1) == 0).all()


def test_scattered_slots_are_filled_and_others_left_alone():
    store = make_store(5 * 6)
    store.shape_for(5, 6)
    old, new = fresh(5, 6), fresh(2, 4)
    store.prefill(range(5)).update(*old, FIRST)
    store.prefill((1, 4)).update(*new, FIRST)
    for part in range(2):
        cached = store.layer(FIRST)[part]
        assert torch.equal(cached[[1, 4], :, :4], new[part])
        assert torch.equal(cached[[1, 4], :, 4:], old[part][[1, 4], :, 4:])
        assert torch.equal(cached[[0, 2, 3]], old[part][[0, 2, 3]])


def test_clearing_one_slot():
    store = make_store(3 * 4)
    store.shape_for(3, 4)
    for layer in range(FIRST, FIRST + LAYERS):
        store.prefill(range(3)).update(*fresh(3, 4), layer)
    store.clear(1)
    for layer in range(FIRST, FIRST + LAYERS):
        assert not store.layer(layer)[:, 1].any()
        assert store.layer(layer)[:, [0, 2]].all()


def test_a_prefix_is_held_once():
    """Through other shapes, refilled slots and clearing; slots lie behind it."""
    store = make_store(24)
    store.shape_for(1, 3)
    keys, values = fresh(1, 3)
    for layer in range(FIRST, FIRST + LAYERS):
        store.prefill([0]).update(keys + layer, values + layer, layer)
    store.hold_prefix(3)
    for slots, capacity in ((3, 7), (2, 10), (1, 21)):
        store.shape_for(slots, capacity)
        for layer in range(FIRST, FIRST + LAYERS):
            store.prefill(range(slots)).update(*fresh(slots, capacity), layer)
            assert torch.equal(store.prefix(layer), torch.cat((keys, values)) + layer)
        store.clear(slots - 1)
        store.clear()
        assert not store.layer(FIRST).any()
        assert torch.equal(store.prefix(FIRST), torch.cat((keys, values)) + FIRST)
    with pytest.raises(UserError, match="but the plan has 21"):
        store.shape_for(1, 24)
    store.hold_prefix(0)
    assert store.capacity == 24
    with pytest.raises(ValueError, match="a prefix fills a slot alone"):
        store.hold_prefix(3)


def test_rows_store_what_follows_the_prefix():
    """Some have it and some do not; those that do see it before their own in prefill, and apart in decode."""
    store = make_store(4 + 3 * 6)
    store.shape_for(1, 4)
    prefix = fresh(1, 4)
    store.prefill([0]).update(*prefix, FIRST)
    store.hold_prefix(4)
    store.shape_for(3, 6)
    own, begun = fresh(3, 6), store.prefill((0, 2), 4, 4)
    assert begun.row_places() == [(0, 4, 4), (2, 4, 4)]
    for cache, start, stop in ((begun, 0, 2), (store.prefill((0, 2), 6, 4), 2, 3)):
        seen = cache.update(*(part[[0, 2], :, start:stop] for part in own), FIRST)
        for found, common, part in zip(seen, prefix, own, strict=True):
            assert torch.equal(found, torch.cat((common.expand(2, -1, -1, -1), part[[0, 2], :, :stop]), 2))
    store.prefill([1]).update(*(part[1:2, :, :4] for part in own), FIRST)
    cache = store.decode(0, 3, torch.tensor([7, 4, 7]), 5, torch.tensor([4, 0, 4]))
    assert cache.row_places() == [(0, 7, 4), (1, 4, 0), (2, 7, 4)]
    for rows in (cache, cache.rows(0, 3)):
        new = torch.stack([part[[0, 1, 2], :, [3, 4, 3]] for part in own])[..., None, :]
        for found, part in zip(rows.update(*new, FIRST), own, strict=True):
            assert torch.equal(found[[0, 2], :, :4], part[[0, 2], :, :4])
            assert torch.equal(found[1], part[1, :, :5])
        assert torch.equal(rows.prefix(FIRST), torch.cat(prefix))


def test_block_tables_name_the_prefix_first():
    store = KVStore(FIRST, LAYERS, 24, HEADS, DIM, torch.float32, torch.device("cpu"), 2)
    store.shape_for(1, 4)
    store.hold_prefix(4)
    store.shape_for(3, 6)
    assert [store.block_table(1, tokens, 4) for tokens in (5, 6, 7)] == [[0, 1, 5], [0, 1, 5], [0, 1, 5, 6]]
    assert store.block_table(1, 3, 0) == [5, 6]


def test_later_chunks_see_earlier_ones():
    store = make_store(4 * 9)
    store.shape_for(4, 9)
    whole = fresh(4, 9)
    store.prefill(range(4)).update(*(part[:, :, :5] for part in whole), FIRST)
    for slots in ((0, 1), (1, 3)):
        rows = list(slots)
        cache = store.prefill(slots, 5)
        seen = cache.update(*(part[rows, :, 5:8] for part in whole), FIRST)
        assert cache.row_places() == [(slot, 5, 0) for slot in slots]
        for found, part in zip(seen, whole, strict=True):
            assert torch.equal(found, part[rows, :, :8])
        one = cache.rows(1, 2).update(*(part[rows[1:], :, 5:9] for part in whole), FIRST)
        assert torch.equal(one[0], whole[0][rows[1:]])
