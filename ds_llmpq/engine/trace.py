"""Where a stage's time went: spans of work and of waiting, their sums, and the Chrome trace of a run.

On a GPU, work is queued, so spans of work are timed by device events and resolved when the sums are read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

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
        self._events: list[dict] = []
        self.spans = 0  # so far: it grows as long as this stage gets on
        self._offset = time.time() - time.perf_counter()

    @contextmanager
    def working(self, name: str, rows: int, tokens: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        events = self._device_events() if self._on_gpu else None
        yield
        if events:
            events[1].record()
            self._device_spans.append((name, *events))
            if len(self._device_spans) >= _MOST_DEVICE_SPANS:
                self._resolve()
        self._add(name, rows, start, tokens, timed=not self._on_gpu)

    @contextmanager
    def waiting(self, name: str, rows: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(f"wait_{name}", rows, start, 0, timed=True)

    def _device_events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
        return events

    def _add(self, name: str, rows: int, start: float, tokens: int, timed: bool) -> None:
        stop = time.perf_counter()
        self.spans += 1
        if timed:
            self._seconds[name] += stop - start
        self._passes[name] += 1
        self._tokens[name] += tokens
        if len(self._events) < _MOST_EVENTS:
            self._events.append(
                {
                    "name": name,
                    "ph": "X",
                    "pid": self.stage,
                    "tid": 0,
                    "ts": (self._offset + start) * 1e6,
                    "dur": (stop - start) * 1e6,
                    "args": {"rows": rows, "tokens": tokens},
                }
            )

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

    def chrome_events(self) -> list[dict]:
        """Complete events ("ph": "X"), microseconds since the epoch."""
        return self._events
