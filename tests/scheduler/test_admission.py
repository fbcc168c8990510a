"""Groups hold every request once, in shapes it fits, and take back what was preempted."""

from array import array
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.batch.request import COMPLETIONS_URL, Request
from ds_llmpq.scheduler.admission import AdmissionQueue
from ds_llmpq.scheduler.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=("x",), ignore_eos=True)


def prepared(sizes):
    """(prompt tokens, answer tokens) of each request."""
    return [
        PreparedRequest(
            Request(n, n + 1, str(n), COMPLETIONS_URL, None, "", PARAMS), array("i", range(prompt)), answer
        )
        for n, (prompt, answer) in enumerate(sizes)
    ]  # fmt: skip


def all_groups(feed):
    groups = []
    while (group := feed.take()) is not None:
        groups.append(group)
    return groups


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=60)


@given(SIZES, st.integers(1, 9), st.integers(7, 30), st.booleans(), st.integers(1, 4))
def test_every_request_is_in_one_group_that_it_fits(sizes, sequences, row_positions, refill, multiple):
    sizes = [(p, a) for p, a in sizes if p + a <= sequences * row_positions]
    requests = prepared(sizes)
    feed = AdmissionQueue(requests, [a for _, a in sizes], sequences, row_positions, refill, multiple)
    groups = all_groups(feed)
    keys = [row.key for group in groups for row in group.sequences]
    assert sorted(keys) == list(range(len(sizes)))
    for group in groups:
        assert group.slots * group.capacity <= sequences * row_positions, "over the budget"
        assert group.slots <= sequences
        assert all(row.max_kv_tokens <= group.capacity for row in group.sequences)
        assert group.joins is refill
        if refill:
            assert group.slots % multiple == 0 or group.slots < multiple
        else:
            assert len(group.sequences) == group.slots
    if not refill:
        assert keys == list(range(len(sizes)))
    else:
        shapes = [group.shape for group in groups]
        assert len(set(shapes)) == sum(a != b for a, b in zip(shapes, [None, *shapes], strict=False)), "shape by shape"
        for shape in set(shapes):
            members = [row.key for group in groups if group.shape == shape for row in group.sequences]
            assert members == sorted(members), "in each the given order"
    assert [index for _, part in feed.streams(range(len(sizes))) for index in part] == keys


@pytest.mark.parametrize("refill", [True, False])
def test_slots_take_whole_blocks(refill):
    sizes = [(3, 3), (10, 5), (30, 30), (1, 1)]
    feed = AdmissionQueue(prepared(sizes), [answer for _, answer in sizes], 4, 16, refill, block=8)
    groups = all_groups(feed)
    assert sorted(row.key for group in groups for row in group.sequences) == [0, 1, 2, 3]
    for group in groups:
        assert group.capacity % 8 == 0
        assert group.slots * group.capacity <= 64
        assert all(row.max_kv_tokens <= group.capacity for row in group.sequences)


def test_one_shape_has_room_for_every_request_of_a_pool():
    feed = AdmissionQueue(prepared([(9, 3), (40, 60), (5, 1)]), [3, 60, 1], 4, 32, True, positions=128, paged=True)
    assert [group.shape for group in all_groups(feed)] == [(4, 128)]
    assert feed.choose_replay_shape() == (4, 128)


def test_a_row_is_the_request():
    [request] = prepared([(3, 5)])
    row = request.sequence(9)
    assert (row.key, row.prompt, row.max_tokens, row.sampling) == (9, (0, 1, 2), 5, PARAMS)


@pytest.mark.parametrize("refill", [True, False])
def test_a_preempted_sequence_comes_again_with_its_tokens_and_room_for_the_worst(refill):
    """Answers of up to 20 tokens admitted for 4: those that go on come back."""
    sizes = [(4, 20)] * 6
    feed = AdmissionQueue(prepared(sizes), [4] * 6, 4, 10, refill)
    first = all_groups(feed)
    assert {group.capacity for group in first} == ({10} if refill else {8})
    rows = [row for group in first for row in group.sequences]
    for row, tokens in zip(rows[:2], count(3), strict=False):
        feed.requeue(row, [7] * tokens)
    again = all_groups(feed)
    back = [row for group in again for row in group.sequences]
    assert [(row.key, row.generated) for row in back] == [(0, (7,) * 3), (1, (7,) * 4)]
    assert all(group.capacity >= 24 and group.slots * group.capacity <= 40 for group in again)
    assert feed.requeued == 2
    assert feed.take() is None


def test_stopped():
    feed = AdmissionQueue(prepared([(3, 3)] * 200), [3] * 200, 2, 6, True)
    assert len(feed.take().sequences) == 32, "few messages even for few slots"
    feed.stop()
    assert feed.take() is None


@given(SIZES, st.integers(1, 9), st.integers(7, 30), st.booleans(), st.integers(1, 9), st.integers(0, 2))
def test_slots_hold_what_follows_a_shared_prefix(sizes, sequences, row_positions, refill, prefix, every):
    """Of every prompt, of some or of none; preempted requests come again in slots for their whole answer."""
    positions = sequences * row_positions - prefix
    shared = [prefix * (every > 0 and n % every == 0 and p > prefix) for n, (p, _) in enumerate(sizes)]
    fitting = [(size, s) for size, s in zip(sizes, shared, strict=True) if sum(size) - s <= positions]
    sizes, shared = [size for size, _ in fitting], [s for _, s in fitting]
    feed = AdmissionQueue(
        prepared(sizes), [1] * len(sizes), sequences, row_positions, refill, positions=positions, shared=shared
    )
    for bounds in ([1] * len(sizes), [answer for _, answer in sizes]):
        groups = all_groups(feed)
        assert sorted(row.key for group in groups for row in group.sequences) == list(range(len(sizes)))
        for group in groups:
            assert group.slots * group.capacity <= positions
            assert group.slots <= sequences
            for row in group.sequences:
                assert len(row.prompt) + bounds[row.key] - shared[row.key] <= group.capacity
                feed.requeue(row, (1,))
