"""Trace files with the Azure LLM inference trace's columns."""

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.research.arrivals import read_trace

TEXT = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:02.2224690,879,0
"""


def test_rows_are_read_from_a_start_and_stretched(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(TEXT)
    trace = read_trace(file)
    assert trace.arrival_seconds.tolist() == pytest.approx([0, 4.314579, 15.541879], abs=1e-6)
    assert trace.generated_tokens.tolist() == [44, 109, 1]
    part = read_trace(file, start_row=1, count=1, scale=3.0)
    assert (part.prompt_tokens.tolist(), part.arrival_seconds.tolist()) == ([396], [0.0])


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", {}, "GeneratedTokens"),
        (TEXT.replace("109", "many"), {}, "cannot be read as a trace"),
        (TEXT, {"start_row": 3}, "no row 3"),
        (TEXT, {"scale": 0.0}, "arrivals.scale is 0.0"),
    ],
)
def test_a_wrong_trace_is_one_sentence(tmp_path, text, arguments, said):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_trace(file, **arguments)
