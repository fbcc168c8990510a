"""Spans of a stage: their sums, what is kept of them, and the file they become."""

import json

import torch

from ds_llmpq.engine import trace as tracing
from ds_llmpq.engine.trace import Trace, build_chrome_events, format_trace


def traced(spans):
    trace = Trace(3, torch.device("cpu"))
    for name, rows in spans:
        with trace.working(name, rows, tokens=10 * rows) if name != "tokens" else trace.waiting(name, rows):
            pass
    return trace


def test_spans_become_chrome_events():
    trace = traced([("prefill", 4), ("tokens", 2), ("decode", 4), ("decode", 3)])
    sent = json.loads(json.dumps(trace.list_spans()))  # it travels as JSON
    text = json.loads("".join(format_trace(build_chrome_events(sent))))
    events = text["traceEvents"]
    assert [event["name"] for event in events] == ["prefill", "wait_tokens", "decode", "decode"]
    assert [event["args"]["rows"] for event in events] == [4, 2, 4, 3]
    assert [event["args"]["tokens"] for event in events] == [40, 0, 40, 30]
    assert {(event["ph"], event["pid"], event["tid"]) for event in events} == {("X", 3, 0)}
    starts = [event["ts"] for event in events]
    assert starts == sorted(starts)
    assert all(event["dur"] >= 0 for event in events)
    assert json.loads("".join(format_trace([]))) == {"displayTimeUnit": "ms", "traceEvents": []}


def test_sums_go_on_when_enough_spans_are_kept(monkeypatch):
    monkeypatch.setattr(tracing, "_MOST_EVENTS", 5)
    trace = traced([("decode", 2)] * 8)
    assert len(list(build_chrome_events(trace.list_spans()))) == 5
    assert trace.summary()["passes"] == {"decode": 8}
    assert trace.summary()["tokens"] == {"decode": 160}
    assert trace.spans == 8
