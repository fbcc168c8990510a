"""A group survives its journey as bytes."""

from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 2**31),
    seed=st.integers(-(2**63), 2**64),
    stop=st.lists(st.text(), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
ROW = st.builds(
    Sequence,
    key=st.integers(0, 2**40),
    prompt=st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple),
    max_tokens=st.integers(0, 2**31),
    sampling=SAMPLING,
    generated=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    targets=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
)


@given(st.lists(ROW, max_size=6).map(tuple), st.integers(0, 9), st.integers(0, 99), st.booleans())
def test_bytes_round_trip(rows, slots, capacity, joins):
    group = RequestGroup(rows, slots, capacity, joins)
    again = RequestGroup.from_bytes(group.to_bytes())
    assert again == group
    assert all(
        isinstance(row.sampling, SamplingParams) and isinstance(row.sampling.stop, tuple) for row in again.sequences
    )


def test_half_a_surrogate_pair_in_a_stop_string():
    group = RequestGroup((Sequence(0, (1,), 1, SamplingParams(stop=("\ud83d", "é\0"))),))
    assert RequestGroup.from_bytes(group.to_bytes()) == group


def test_slots_and_capacity_are_those_of_the_rows_unless_given():
    group = RequestGroup((Sequence(0, (1,) * 5, 3), Sequence(1, (1,), 8), Sequence(2, (1,) * 2, 2)))
    assert [row.max_kv_tokens for row in group.sequences] == [8, 9, 4]
    assert group.shape == (3, 9)
    assert RequestGroup(group.sequences, 2, 20).shape == (2, 20)


def test_prefill_runs_over_prompt_and_tokens_generated_before():
    assert Sequence(0, (1, 2), 9, generated=(5, 6)).prefill_tokens == (1, 2, 5, 6)
    assert Sequence(0, (1, 2), 9, generated=(5, 6)).max_kv_tokens == 11
