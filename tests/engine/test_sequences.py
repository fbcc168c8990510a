"""The state that all stages keep of the sequences in flight, and how rows are cut into micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.engine.sequences import Finish, MicroBatch, Sequences, decode_groups, prefill_micro_batches

ALL = MicroBatch(0, 3)


def test_tokens_positions_and_finish():
    rows = Sequences([4, 1, 7])
    assert len(rows) == 3
    assert rows.record(ALL, [10, 11, 12], [0, 1, 0]) == [1]
    assert (rows.last_tokens(ALL), rows.positions(ALL)) == ([10, 11, 12], [4, 1, 7])
    assert rows.record(ALL, [20, 21, 22], [0, 2, 2]) == [2], "row 1 had ended"
    assert rows.generated == [[10, 20], [11], [12, 22]]
    assert rows.finish == [Finish.RUNNING, Finish.STOP, Finish.LENGTH]
    # a row that has ended goes along at its last place, within its own slots
    assert (rows.last_tokens(ALL), rows.positions(ALL)) == ([20, 11, 22], [5, 1, 8])
    assert rows.running(ALL)
    assert not rows.running(MicroBatch(1, 3))


def test_awaited_until_every_row_s_token_is_there():
    rows = Sequences([1] * 4)
    rows.started(MicroBatch(0, 4))
    rows.record(MicroBatch(0, 2), [5, 5], [0, 1])
    assert not rows.awaited(MicroBatch(0, 2))
    assert rows.awaited(MicroBatch(1, 3)), "a decode group over two prefill micro-batches waits for both"
    rows.record(MicroBatch(2, 4), [5, 5], [0, 0])
    assert not rows.awaited(MicroBatch(0, 4))
    rows.started(MicroBatch(1, 2))
    assert rows.awaited(MicroBatch(0, 2)), "also a row that has ended is passed on with its group"


def test_a_message_of_another_size_is_refused():
    with pytest.raises(ValueError, match="zip"):
        Sequences([1, 1]).record(MicroBatch(0, 2), [5], [0])


LENGTHS = st.lists(st.integers(1, 200), max_size=40)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 600))
def test_prefill_micro_batches_cover_the_rows_and_keep_both_bounds(lengths, rows, tokens):
    batches = prefill_micro_batches(lengths, rows, tokens)
    assert [row for batch in batches for row in batch.rows()] == list(range(len(lengths)))
    for index, batch in enumerate(batches):
        padded = [size * max(lengths[batch.start : batch.start + size]) for size in range(1, batch.size + 1)]
        assert 1 <= batch.size <= rows
        assert batch.size == 1 or padded[-1] <= tokens
        if index + 1 < len(batches):  # as large as the bounds allow
            larger = (batch.size + 1) * max(lengths[batch.start : batch.stop + 1])
            assert batch.size == rows or larger > tokens


@given(st.integers(0, 100), st.integers(1, 30))
def test_decode_groups_cover_the_rows(sequences, rows):
    groups = decode_groups(sequences, rows)
    assert [row for group in groups for row in group.rows()] == list(range(sequences))
    assert all(group.size == rows for group in groups[:-1])
    assert all(1 <= group.size <= rows for group in groups)
