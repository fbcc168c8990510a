"""The steps of decode passes: how much of the cache they attend to."""

from types import SimpleNamespace

import pytest
import torch

from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.step_builder import StepBuilder

PREFIX, CAPACITY = 5, 72


def decode_step(places, shared):
    """Of one row a slot, at `places` in its sequence, of which so many tokens are the prefix's."""
    store = KVStore(0, 1, PREFIX + 2 * CAPACITY, 1, 4, torch.float32, torch.device("cpu"))
    store.shape_for(1, PREFIX)
    store.hold_prefix(PREFIX)
    store.shape_for(2, CAPACITY)
    stream = SimpleNamespace(ragged=False, batch_invariant=False, slots=SimpleNamespace(shared=shared))
    batch = SimpleNamespace(slots=(0, 1), live=(0, 1))
    builder = StepBuilder(store, lambda step: None, store.device, is_first=False)
    return builder.decode_at(stream, batch, places)


@pytest.mark.parametrize(("own", "seen"), [(0, 32), (31, 32), (32, 64), (63, 64), (64, CAPACITY), (71, CAPACITY)])
def test_few_lengths_are_met_beside_a_prefix(own, seen):
    """All of a length's kernels are made for it; the mask hides what is too much."""
    step = decode_step([PREFIX + own, PREFIX], [PREFIX, PREFIX])
    assert step.kv_tokens == seen
    mask = step.mask()[:, 0, 0]
    assert mask.shape == (2, PREFIX + seen)
    assert mask.sum(1).tolist() == [PREFIX + own + 1, PREFIX + 1]
    assert mask[0, : PREFIX + own + 1].all()


def test_without_a_prefix_no_more_is_read_than_is_stored():
    assert decode_step([40, 3], [0, 0]).kv_tokens == 41
