"""Waves hold every request once, in the order asked for."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.batch.ordering import ORDERINGS, padding_share, waves
from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.errors import UserError


def prepared(lengths):
    return [PreparedRequest(place, array("i", [0] * length), 1) for place, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 7), st.sampled_from(ORDERINGS))
def test_every_request_runs_once_in_full_waves(lengths, sequences, ordering):
    rows = prepared(lengths)
    batches = waves(rows, sequences, ordering)
    flat = [each.request for batch in batches for each in batch]
    assert sorted(flat) == list(range(len(rows)))
    assert all(len(batch) == sequences for batch in batches[:-1])
    assert all(batches)
    if ordering == "arrival":
        assert flat == list(range(len(rows)))
    else:
        assert flat == sorted(flat, key=lambda place: (-lengths[place], place))


def test_grouping_by_length_saves_padding():
    rows = prepared([1, 8] * 8)
    assert padding_share(waves(rows, 4)) == pytest.approx(1 - 72 / 128)
    assert padding_share(waves(rows, 4, "prompt_length")) == 0
    assert padding_share([]) == 0


def test_bad_arguments():
    with pytest.raises(UserError, match="arrival, prompt_length"):
        waves([], 1, "random")
    with pytest.raises(UserError, match="at least 1"):
        waves([], 0)
