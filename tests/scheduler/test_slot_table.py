"""The state that all stages keep of the sequences in flight, and how rows are cut into micro-batches."""

import pytest

from ds_llmpq.scheduler.micro_batch import MicroBatch
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.slot_table import Finish, SlotTable


def passing(slots, live=None):
    return MicroBatch(1, "decode", tuple(slots), tuple(live or slots))


def of_rows(*prompt_tokens):
    table = SlotTable(len(prompt_tokens))
    for slot, tokens in enumerate(prompt_tokens):
        table.admit(slot, Sequence(slot, (1,) * tokens, 9))
    return table


def test_tokens_positions_and_finish():
    found = of_rows(4, 1, 7)
    everyone = passing(range(3))
    assert found.record(everyone, [10, 11, 12], [0, 1, 0]) == [1]
    assert [found.position(slot) for slot in range(3)] == [4, 1, 7]
    assert found.record(passing(range(3), [0, 2]), [20, 21, 22], [0, 2, 2]) == [2], "slot 1 only went along"
    assert found.generated == [[10, 20], [11], [12, 22]]
    assert found.finish == [Finish.RUNNING, Finish.STOP, Finish.LENGTH]
    assert [found.has_ended(slot) for slot in range(3)] == [False, True, True]


def test_a_slot_s_next_sequence_starts_anew():
    found = of_rows(4, 1)
    found.record(passing([0, 1]), [10, 11], [1, 0])
    found.admit(0, Sequence(7, (1, 2), 9, generated=(3, 4)))
    assert (found.generated[0], found.has_ended(0), found.position(0)) == ([3, 4], False, 3)
    found.record(passing([0]), [5], [0])
    assert (found.generated[0], found.position(0)) == ([3, 4, 5], 4)
    assert found.generated[1] == [11]


def test_awaited_until_every_slot_s_token_is_there():
    found = of_rows(1, 1, 1, 1)
    found.start(passing(range(4), [0, 2, 3]))
    assert not found.are_awaited([1]), "no token comes for a slot that only goes along"
    found.record(passing([0]), [5], [0])
    assert not found.are_awaited([0, 1])
    assert found.are_awaited([1, 2])
    found.record(passing([2, 3]), [5, 5], [0, 0])
    assert not found.are_awaited(range(4))


def test_a_message_of_another_size_is_refused():
    with pytest.raises(ValueError, match="zip"):
        of_rows(1, 1).record(passing([0, 1]), [5], [0])
