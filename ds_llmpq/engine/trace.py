"""Where a stage's time went: spans of work and of waiting, their sums, and the Chrome trace of a run.

On a GPU, work is queued, so spans of work are timed by device events and resolved when the sums are read.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_MOST_EVENTS = 100_000  # what a trace viewer still opens
_MOST_DEVICE_SPANS = 10_000  # kept before they are resolved, which waits for the device


class Trace:
    """Spans of one stage since `origin` (time.time(), so that ranks of one clock line up)."""

    def __init__(self, stage: int, device: torch.device):
        self.stage = stage
        self._on_gpu = device.type == "cuda"
        self._device_spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._passes: dict[str, int] = defaultdict(int)
        self._tokens: dict[str, int] = defaultdict(int)
        # the first spans, by columns: a day's run must not grow
        self._names: list[str] = []
        self._columns = {
            "name": array("B"), "start": array("d"), "seconds": array("d"), "rows": array("i"), "tokens": array("i")
        }  # fmt: skip
        self.spans = 0  # so far: it grows as long as this stage gets on
        self._offset = time.time() - time.perf_counter()

    @contextmanager
    def working(self, name: str, rows: int, tokens: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        events = self._open_device_events() if self._on_gpu else None
        yield
        if events:
            events[1].record()
            self._device_spans.append((name, *events))
            if len(self._device_spans) >= _MOST_DEVICE_SPANS:
                self._resolve()
        self._add(name, rows, start, tokens, timed=not self._on_gpu)

    @contextmanager
    def sharing(self, parts: Sequence[tuple[str, int, int]]) -> Iterator[None]:
        """One call of several (name, rows, tokens) on a CPU: its time is shared out by their tokens."""
        start = time.perf_counter()
        yield
        a_token = (time.perf_counter() - start) / sum(tokens for *_, tokens in parts)
        for name, rows, tokens in parts:
            self._add(name, rows, start, tokens, timed=True, stop=start + a_token * tokens)
            start += a_token * tokens

    @contextmanager
    def waiting(self, name: str, rows: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(f"wait_{name}", rows, start, 0, timed=True)

    def _open_device_events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
        return events

    def _add(self, name: str, rows: int, start: float, tokens: int, timed: bool, stop: float | None = None) -> None:
        stop = stop or time.perf_counter()
        self.spans += 1
        if timed:
            self._seconds[name] += stop - start
        self._passes[name] += 1
        self._tokens[name] += tokens
        if len(self._columns["name"]) < _MOST_EVENTS:
            if name not in self._names:
                self._names.append(name)
            values = (self._names.index(name), self._offset + start, stop - start, rows, tokens)
            for column, value in zip(self._columns.values(), values, strict=True):
                column.append(value)

    def summary(self) -> dict:
        """Seconds, passes and tokens by span name, all measured on this stage."""
        self._resolve()
        return {"seconds": dict(self._seconds), "passes": dict(self._passes), "tokens": dict(self._tokens)}

    def _resolve(self) -> None:
        if self._device_spans:
            torch.cuda.synchronize()
            for name, start, stop in self._device_spans:
                self._seconds[name] += start.elapsed_time(stop) / 1e3
            self._device_spans.clear()

    def list_spans(self) -> dict:
        """The first spans as plain data, for `build_chrome_events`: `names`, and columns of equal length."""
        columns = {name: column.tolist() for name, column in self._columns.items()}
        return {"stage": self.stage, "names": self._names, **columns}


def build_chrome_events(seen: Mapping[str, Sequence]) -> Iterator[dict]:
    """Complete events ("ph": "X") of what `list_spans` returned, microseconds since the epoch."""
    columns = (seen[name] for name in ("name", "start", "seconds", "rows", "tokens"))
    for name, start, seconds, rows, tokens in zip(*columns, strict=True):
        yield {
            "name": seen["names"][name],
            "ph": "X",
            "pid": seen["stage"],
            "tid": 0,
            "ts": start * 1e6,
            "dur": seconds * 1e6,
            "args": {"rows": rows, "tokens": tokens},
        }


def format_trace(events: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A Chrome trace, an event at a time: all of them together would take more memory than the batch."""
    yield '{"displayTimeUnit": "ms", "traceEvents": ['
    for index, event in enumerate(events):
        yield f"{',' if index else ''}\n{json.dumps(event)}"
    yield "\n]}\n"
