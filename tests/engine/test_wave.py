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
)


@given(st.lists(ROW, max_size=6).map(tuple))
def test_bytes_round_trip(rows):
    wave = Wave(rows)
    again = Wave.from_bytes(wave.to_bytes())
    assert again == wave
    assert all(isinstance(row.sampling, RowSampling) and isinstance(row.stop, tuple) for row in again.rows)


def test_half_a_surrogate_pair_in_a_stop_string():
    wave = Wave((WaveRow(0, (1,), 1, stop=("\ud83d", "é\0")),))
    assert Wave.from_bytes(wave.to_bytes()) == wave


def test_capacity_is_the_longest_row_s():
    wave = Wave((WaveRow(0, (1,) * 5, 3), WaveRow(1, (1,), 8), WaveRow(2, (1,) * 2, 2)))
    assert [row.slots for row in wave.rows] == [8, 9, 4]
    assert wave.capacity == 9
