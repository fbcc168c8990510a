"""Timing one action on one device: warmed up, repeated, with the repeats that other processes disturbed left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch

from ds_llmpq.cost.profile import NEW_SIZE, NEW_SIZE_MIXED, Point, Sample
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

_MOST_REPEATS = 40
_AT_ONCE_SECONDS, _MOST_AT_ONCE = 0.02, 50
_DISTURBED = 1.1  # wall time over processor time beyond which another process had the core meanwhile
_SLACK_SECONDS = 3e-5
# between the passes of a stage: layers of half a millisecond take 3 to 8 % longer after it than without a pause
PAUSE_SECONDS = 1e-3


@dataclass(frozen=True)
class Timing:
    """first_seconds: of the first warm-up, whose kernels may have been made for it; 0 where nothing was warmed up."""

    repeats: int
    undisturbed: int
    median_seconds: float
    minimum_seconds: float
    spread: float
    first_seconds: float = 0.0


@dataclass(frozen=True)
class Timer:
    """`threads` and `cpu_share` are those of a CPU stage; on a GPU device events are used. `pause_seconds`: how long
    the processor rests before each repeat, as a stage waits between its passes. `fewest`: repeats, however long."""

    device: torch.device
    threads: int = 1
    cpu_share: float = 1.0
    pause_seconds: float = 0.0
    fewest: int = 3

    def time(self, action: Callable[[], object], seconds: float, warm_up: int = 1) -> Timing:
        """Repeats `action` for about `seconds`, at least `fewest` times."""
        # one thread's own time: what disturbs a single pass cannot be told from what is new in it
        clock, share = (time.thread_time, self.cpu_share) if self.threads == 1 else (time.perf_counter, 1.0)
        begin, first = clock(), 0.0
        for _ in range(warm_up):
            action()
            first = first or (clock() - begin) / share
        timing = self._on_gpu(action, seconds) if self.device.type == "cuda" else self._on_cpu(action, seconds)
        return replace(timing, first_seconds=first)

    def _on_cpu(self, action: Callable[[], object], seconds: float) -> Timing:
        times: list[float] = []
        owned: list[float] = []
        begin = time.perf_counter()
        while len(times) < self.fewest or (time.perf_counter() - begin < seconds and len(times) < _MOST_REPEATS):
            if self.pause_seconds:
                time.sleep(self.pause_seconds)
            wall, cpu = time.perf_counter(), time.thread_time()
            action()
            times.append(time.perf_counter() - wall)
            owned.append((time.thread_time() - cpu) / self.cpu_share)
        if self.threads > 1:  # the main thread's own time tells only where it does all the work
            return _timing(times, times, len(times))
        clean = [t for t, own in zip(times, owned, strict=True) if t <= _DISTURBED * own + _SLACK_SECONDS]
        # on a crowded machine no repeat has the processor to itself; what it used of it is then the better number
        return _timing(times, clean if 3 * len(clean) >= len(times) else owned, len(clean))

    def _on_gpu(self, action: Callable[[], object], seconds: float) -> Timing:
        # several at once, as in a steady state: before the first the device waits for the host
        at_once = max(1, min(_MOST_AT_ONCE, int(_AT_ONCE_SECONDS / self._span(action, 1))))
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < self.fewest or (time.perf_counter() - begin < seconds and len(times) < _MOST_REPEATS):
            times.append(self._span(action, at_once))
        return _timing(times, times, len(times))

    def _span(self, action: Callable[[], object], calls: int) -> float:
        """Seconds of a call between two events of the device."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(calls):
            action()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) / 1e3 / calls


def _timing(times: list[float], kept: list[float], undisturbed: int) -> Timing:
    middle = median(kept)
    quarters = quantiles(kept, n=4) if len(kept) > 1 else [middle] * 3
    return Timing(len(times), undisturbed, middle, min(kept), (quarters[2] - quarters[0]) / middle if middle else 0.0)


class NewSizes:
    """What the first pass of a number of tokens costs beyond the next ones, in processor seconds. A process keeps the
    kernels that a library makes for a size, so the first point of that size alone shows it; unquantized and quantized
    layers share some of them, so that both together cost less than twice as much."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[bool, float]] = {}  # by tokens of the pass, and whether layers are quantized

    def add(self, point: Point, timing: Timing, cpu_share: float) -> None:
        if point.part == "layer" and timing.first_seconds:
            extra = cpu_share * (timing.first_seconds - timing.median_seconds)
            found = self._seconds.setdefault(point.tokens, {})
            quantized = point.bits < UNQUANTIZED_BITS
            found[quantized] = max(found.get(quantized, 1e-9), extra)

    def samples(self, device_type: str, cpu_share: float) -> list[Sample]:
        found = []
        for tokens, by_kind in self._seconds.items():
            entries = [(NEW_SIZE, max(by_kind.values()))]
            entries += [(NEW_SIZE_MIXED, sum(by_kind.values()))] if len(by_kind) > 1 else []
            for part, seconds in entries:
                point = Point(device_type, part, "prefill", 0, 1, tokens)
                found.append(Sample(point, 0, 1, 1, seconds / cpu_share, seconds / cpu_share, 0.0))
        return found
