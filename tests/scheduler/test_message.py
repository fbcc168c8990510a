"""What travels between ranks comes back as it was, and what is torn is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.scheduler.request_group import pack_message, unpack_message

TOKENS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple), max_size=5)
FIELDS = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(FIELDS, TOKENS)
def test_round_trip(fields, tokens):
    assert unpack_message(pack_message(fields, tokens)) == (fields, tokens)


@given(TOKENS, st.integers(1, 30))
def test_a_torn_message_is_refused(tokens, missing):
    data = pack_message("x", tokens)
    with pytest.raises(ValueError, match=r"message|buffer|size|Expect"):
        unpack_message(data[: max(0, len(data) - missing)])


def test_a_token_that_does_not_fit_is_refused():
    with pytest.raises(OverflowError):
        pack_message(None, [(2**31,)])
