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


@pytest.mark.parametrize(("paged", "block", "tokens"), [(False, 1, 3), (False, 2, 4), (True, 2, 4)])
def test_a_prefix_is_kept_and_copied(paged, block, tokens):
    """Through other shapes, refilled slots and clearing."""
    store = KVStore(FIRST, LAYERS, 24, HEADS, DIM, torch.float32, torch.device("cpu"), block, paged)

    def front(slot, layer):
        """[2, kv_heads, tokens, head_dim], read from the views that attention has."""
        if not paged:
            return store.layer(layer)[:, slot, :, :tokens]
        first = slot * store.blocks_of_slot
        blocks = store.blocks(layer)[:, first : first + tokens // block]
        return blocks.transpose(1, 2).reshape(2, HEADS, tokens, DIM)

    def fill():
        store.clear()
        store.memory[:, :, : (24 - store.prefix_tokens) * HEADS * DIM].copy_(
            torch.randn(LAYERS, 2, (24 - store.prefix_tokens) * HEADS * DIM)
        )

    store.shape_for(1, tokens + 1)
    fill()
    kept = [front(0, layer).clone() for layer in range(FIRST, FIRST + LAYERS)]
    store.hold_prefix(tokens)
    for slots, capacity in ((3, 6), (2, 10), (1, 20)):
        store.shape_for(slots, capacity)
        fill()
        before = [front(slot, FIRST).clone() for slot in range(slots)]
        store.copy_prefix([slots - 1])
        for layer, wanted in zip(range(FIRST, FIRST + LAYERS), kept, strict=True):
            assert torch.equal(front(slots - 1, layer), wanted)
        assert all(torch.equal(front(slot, FIRST), before[slot]) for slot in range(slots - 1))
    with pytest.raises(UserError, match=f"but the plan has {24 - tokens}"):
        store.shape_for(1, 24)
    store.hold_prefix(0)
    store.shape_for(1, 24)


def test_prompts_behind_a_prefix_see_it():
    store = make_store(4 * 9)
    store.shape_for(4, 9)
    whole = fresh(4, 9)
    store.prefill(range(4)).update(*(part[:, :, :5] for part in whole), FIRST)
    for slots in ((0, 1), (1, 3)):
        rows = list(slots)
        cache = store.prefill(slots, 5)
        seen = cache.update(*(part[rows, :, 5:8] for part in whole), FIRST)
        assert cache.row_places() == [(slot, 5) for slot in slots]
        for found, part in zip(seen, whole, strict=True):
            assert torch.equal(found, part[rows, :, :8])
        one = cache.rows(1, 2).update(*(part[rows[1:], :, 5:9] for part in whole), FIRST)
        assert torch.equal(one[0], whole[0][rows[1:]])
