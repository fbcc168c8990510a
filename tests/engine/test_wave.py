"""A wave survives its journey as bytes."""

from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.engine.sampling import RowSampling
from ds_llmpq.engine.wave import Wave, WaveRow

SAMPLING = st.builds(
    RowSampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 2**31),
    seed=st.integers(-(2**63), 2**64),
)
ROW = st.builds(
    WaveRow,
    key=st.integers(0, 2**40),
    prompt=st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple),
    max_tokens=st.integers(0, 2**31),
    sampling=SAMPLING,
    stop=st.lists(st.text(), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    generated=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
)


@given(st.lists(ROW, max_size=6).map(tuple), st.integers(0, 9), st.integers(0, 99), st.booleans())
def test_bytes_round_trip(rows, slots, capacity, joins):
    wave = Wave(rows, slots, capacity, joins)
    again = Wave.from_bytes(wave.to_bytes())
    assert again == wave
    assert all(isinstance(row.sampling, RowSampling) and isinstance(row.stop, tuple) for row in again.rows)


def test_half_a_surrogate_pair_in_a_stop_string():
    wave = Wave((WaveRow(0, (1,), 1, stop=("\ud83d", "é\0")),))
    assert Wave.from_bytes(wave.to_bytes()) == wave


def test_slots_and_capacity_are_those_of_the_rows_unless_given():
    wave = Wave((WaveRow(0, (1,) * 5, 3), WaveRow(1, (1,), 8), WaveRow(2, (1,) * 2, 2)))
    assert [row.positions for row in wave.rows] == [8, 9, 4]
    assert wave.shape == (3, 9)
    assert Wave(wave.rows, 2, 20).shape == (2, 20)


def test_prefill_runs_over_prompt_and_tokens_generated_before():
    assert WaveRow(0, (1, 2), 9, generated=(5, 6)).known == (1, 2, 5, 6)
    assert WaveRow(0, (1, 2), 9, generated=(5, 6)).positions == 11
