"""Waves hold every request once, in shapes it fits, and give back what overran."""

from array import array
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.batch.request import COMPLETIONS_URL, Request, SamplingParams
from ds_llmpq.serving.admission import Feed, wave_row

PARAMS = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, seed=3, max_tokens=None, stop=("x",), ignore_eos=True)


def prepared(sizes):
    """(prompt tokens, answer tokens) of each request."""
    return [
        PreparedRequest(
            Request(n, n + 1, str(n), COMPLETIONS_URL, None, "", PARAMS), array("i", range(prompt)), answer
        )
        for n, (prompt, answer) in enumerate(sizes)
    ]  # fmt: skip


def all_waves(feed):
    waves = []
    while (wave := feed.take()) is not None:
        waves.append(wave)
    return waves


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=60)


@given(SIZES, st.integers(1, 9), st.integers(7, 30), st.booleans(), st.integers(1, 4))
def test_every_request_is_in_one_wave_that_it_fits(sizes, sequences, row_positions, refill, multiple):
    sizes = [(p, a) for p, a in sizes if p + a <= sequences * row_positions]
    requests = prepared(sizes)
    feed = Feed(requests, [a for _, a in sizes], sequences, row_positions, refill, multiple)
    waves = all_waves(feed)
    keys = [row.key for wave in waves for row in wave.rows]
    assert sorted(keys) == list(range(len(sizes)))
    for wave in waves:
        assert wave.slots * wave.capacity <= sequences * row_positions, "over the budget"
        assert wave.slots <= sequences
        assert all(row.positions <= wave.capacity for row in wave.rows)
        assert wave.joins is refill
        if refill:
            assert wave.slots % multiple == 0 or wave.slots < multiple
        else:
            assert len(wave.rows) == wave.slots
    if not refill:
        assert keys == list(range(len(sizes)))
    else:
        shapes = [wave.shape for wave in waves]
        assert len(set(shapes)) == sum(a != b for a, b in zip(shapes, [None, *shapes], strict=False)), "shape by shape"
        for shape in set(shapes):
            members = [row.key for wave in waves if wave.shape == shape for row in wave.rows]
            assert members == sorted(members), "in each the given order"
    assert [index for _, part in feed.streams(range(len(sizes))) for index in part] == keys


@pytest.mark.parametrize("refill", [True, False])
def test_slots_take_whole_blocks(refill):
    sizes = [(3, 3), (10, 5), (30, 30), (1, 1)]
    feed = Feed(prepared(sizes), [answer for _, answer in sizes], 4, 16, refill, block=8)
    waves = all_waves(feed)
    assert sorted(row.key for wave in waves for row in wave.rows) == [0, 1, 2, 3]
    for wave in waves:
        assert wave.capacity % 8 == 0
        assert wave.slots * wave.capacity <= 64
        assert all(row.positions <= wave.capacity for row in wave.rows)


def test_a_row_is_the_request():
    [request] = prepared([(3, 5)])
    row = wave_row(9, request)
    assert (row.key, row.prompt, row.max_tokens, row.stop, row.ignore_eos) == (9, (0, 1, 2), 5, ("x",), True)
    assert (row.sampling.temperature, row.sampling.top_p, row.sampling.top_k, row.sampling.seed) == (0.5, 0.9, 7, 3)


@pytest.mark.parametrize("refill", [True, False])
def test_what_overran_comes_again_with_its_tokens_and_room_for_the_worst(refill):
    """Answers of up to 20 tokens admitted for 4: those that go on come back."""
    sizes = [(4, 20)] * 6
    feed = Feed(prepared(sizes), [4] * 6, 4, 10, refill)
    first = all_waves(feed)
    assert {wave.capacity for wave in first} == ({10} if refill else {8})
    rows = [row for wave in first for row in wave.rows]
    for row, tokens in zip(rows[:2], count(3), strict=False):
        feed.requeue(row, [7] * tokens)
    again = all_waves(feed)
    back = [row for wave in again for row in wave.rows]
    assert [(row.key, row.generated) for row in back] == [(0, (7,) * 3), (1, (7,) * 4)]
    assert all(wave.capacity >= 24 and wave.slots * wave.capacity <= 40 for wave in again)
    assert feed.requeued == 2
    assert feed.take() is None


def test_stopped():
    feed = Feed(prepared([(3, 3)] * 200), [3] * 200, 2, 6, True)
    assert len(feed.take().rows) == 32, "few messages even for few slots"
    feed.stop()
    assert feed.take() is None
