"""Lines that ranks write for `run`: read again as written, and never a traceback whatever stands after their mark."""

import io
import json
import os

import pytest

from ds_llmpq.launch.attempt import Listener
from ds_llmpq.launch.failures import FAILURE_MARK, FAULT, Failure, read_failure
from ds_llmpq.launch.process_monitor import Line
from ds_llmpq.launch.progress import PROGRESS_MARK, ProgressLines, ProgressReport, parse_progress

FIELDS = {"phase": "prompts", "done": 1, "total": 2, "note": "", "pid": 7}
BROKEN = ["", "[]", "7", "null", "{}", '{"phase": "prompts"}', "[" * 100_000, "{" * 10, "9" * 5_000, "nan"]


def test_a_progress_line_is_read_as_written():
    stream = io.StringIO()
    ProgressLines(stream).show("prompts", 3, 4, "12 tokens/s")
    assert parse_progress("host-1: " + stream.getvalue()) == ProgressReport("prompts", 3, 4, "12 tokens/s", os.getpid())
    assert parse_progress("a line of a library") is None


@pytest.mark.parametrize(
    "text",
    [
        *BROKEN,
        *(
            json.dumps(FIELDS | wrong)
            for wrong in (
                {"done": "3"}, {"done": 1.5}, {"total": -1}, {"total": float("inf")}, {"pid": None}, {"pid": True},
                {"phase": ["prompts"]}, {"phase": "\x1b[2J"}, {"note": {}}, {"more": 1},
            )
        ),
    ],
)  # fmt: skip
def test_a_broken_progress_line_is_text(text):
    listener = Listener("mark")
    assert parse_progress(PROGRESS_MARK + json.dumps(FIELDS)) is not None
    assert listener.on_line(PROGRESS_MARK + text) is Line.TEXT
    assert not listener.serving()


@pytest.mark.parametrize(
    "text",
    [
        *BROKEN,
        *(
            json.dumps({"kind": FAULT, "type": "E", "message": "m"} | wrong)
            for wrong in ({"kind": "other"}, {"rank": "0"}, {"line": 1.5}, {"message": ["m"]}, {"type": None})
        ),
    ],
)
def test_a_broken_failure_line_is_no_failure(text):
    said = Failure(FAULT, "E", "m", rank=1)
    assert read_failure(said.to_line()) == said
    assert read_failure(FAILURE_MARK + text) is None
