"""Lines that ranks write for `run`: read again as written, and never a traceback whatever stands after their mark."""

import io
import json
import os

import pytest

from ds_llmpq.launch import progress
from ds_llmpq.launch.attempt import Listener
from ds_llmpq.launch.failures import FAILURE_MARK, FAULT, Failure, read_failure
from ds_llmpq.launch.process_monitor import Line
from ds_llmpq.launch.progress import PROGRESS_MARK, ProgressBar, ProgressLines, ProgressReport, parse_progress

FIELDS = {"phase": "prompts", "done": 1, "total": 2, "note": "", "pid": 7}
BROKEN = ["", "[]", "7", "null", "{}", '{"phase": "prompts"}', "[" * 100_000, "{" * 10, "9" * 5_000, "nan"]


def test_a_progress_line_is_read_as_written():
    stream = io.StringIO()
    ProgressLines(stream).show("prompts", 3, 4, "12 tokens/s")
    assert parse_progress("host-1: " + stream.getvalue()) == ProgressReport("prompts", 3, 4, "12 tokens/s", os.getpid())
    assert parse_progress("a line of a library") is None


def test_a_log_gets_a_line_now_and_then_and_no_carriage_returns(monkeypatch):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = ProgressBar(stream)
    for done in range(101):
        bar.show("prompts", done, 100, f"{done} tokens/s")
        now[0] += 0.5
    bar.show("prompts", 100, 100, "100 tokens/s")
    bar.show("load", 1, 2)
    bar.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "prompts: 0 of 100, 0 tokens/s"
    assert lines[1] == "prompts: 20 of 100, 20 tokens/s"
    assert lines[-2:] == ["prompts: 100 of 100, 100 tokens/s", "load: 1 of 2"]
    assert len(lines) == 7
    assert "\r" not in stream.getvalue()


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
