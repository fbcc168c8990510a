"""Layers, embedding and head timed by several ranks at the same moment, each on its own device."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from ds_llmpq.cost.fit import FEWEST_POINTS
from ds_llmpq.cost.profile import ALONE, TOGETHER, Point, Sample
from ds_llmpq.engine.rank_context import RankContext
from ds_llmpq.engine.runner.capture import CudaGraphs
from ds_llmpq.launch.progress import ProgressLines
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import Plan
from ds_llmpq.profiling.parts import Parts
from ds_llmpq.profiling.timer import PAUSE_SECONDS, NewSizes, Timer
from ds_llmpq.quant.config import QuantConfig

_ROUNDS = 2  # through all points: another machine on the same processor can slow some tenths of a second, not both
_ALONE_POINTS, _ALONE_ROUNDS, _ALONE_SECONDS = 4, 2, 0.01  # a turn of a point; a round has one more than devices
_PREFILL_TOKENS = 64
_FEWEST_REPEATS = 2  # of a point in a round, beside its warm-up


@torch.inference_mode()
def time_points(
    wanted: dict[str, Any], plan: Plan, context: RankContext
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Samples of this rank's device as plain objects, and [[seconds that passed, seconds of its own]]; both empty on a
    rank without a device, which waits with the others.

    All ranks start a point together, and leave it out together where one of them would take too long for it. Points of
    the smallest micro-batch are always timed: a fit needs them. On a crowded machine, where the clock on the wall runs
    far ahead of the time that is used, no more than it needs.
    """
    devices, rank, group = wanted["devices"], context.rank, context.side_group
    points = [Point(**entry) for entry in devices[rank]["points"]] if rank < len(devices) else []
    share = devices[rank]["cpu_share"] if points else 1.0
    pause = PAUSE_SECONDS if len(devices) > 1 else 0.0  # a device alone waits for no other stage
    timer = Timer(context.device, context.stage.threads or 1, share, pause, _FEWEST_REPEATS)
    parts = _load(wanted, plan, points, context.device) if points else None
    if parts is not None:
        parts.throttle(share)
    smallest = min((point.batch for point in points), default=0)
    left, samples, new_sizes = float(wanted["seconds"]), [], NewSizes()
    late, passed, own = time.perf_counter() + wanted["late_seconds"], 0.0, 0.0
    last: dict[tuple[str, str, int], tuple[float, int]] = {}
    timed: Counter[tuple[str, str, int]] = Counter()
    longest = max(len(entry["points"]) for entry in devices)
    progress = ProgressLines(sys.stdout)
    for round_, turn in itertools.product(range(_ROUNDS), range(longest)):
        if context.is_driver:
            progress.show("calibration", round_ * longest + turn + 1, _ROUNDS * longest)
        point = points[turn] if turn < len(points) else None
        kind = (point.part, point.phase, point.bits) if point else None
        is_late = time.perf_counter() > late
        needed = point and round_ == 0 and point.batch == smallest and not (is_late and timed[kind] >= FEWEST_POINTS)
        if point is None or needed:
            expected = 0.0
        else:
            expected = math.inf if is_late else _guess(point, last) * (1 + _FEWEST_REPEATS)
        if _slowest(expected, group) > max(left, 0.0):
            continue
        spent = 0.0
        if point is not None:
            begin = time.perf_counter()
            still_to_come = (_ROUNDS - round_) * len(points) - turn
            seconds = 0.0 if is_late else max(left, 0.0) / still_to_come
            sample, spent = _time(timer, parts, point, round_, seconds, new_sizes)
            passed, own = passed + time.perf_counter() - begin, own + spent
            samples.append(asdict(sample))
            timed[kind] += 1
            last[kind] = sample.median_seconds, point.tokens
        left -= _slowest(spent, group)
    if len(devices) > 1 and context.device.type == "cpu":
        samples += _time_alone(replace(timer, pause_seconds=0.0), parts, points, len(devices), context)
    if not points:
        return [], []
    return samples + [asdict(sample) for sample in new_sizes.samples(points[0].device_type, share)], [[passed, own]]


def _time_alone(
    timer: Timer, parts: Parts | None, points: list[Point], devices: int, context: RankContext
) -> list[dict[str, Any]]:
    """Samples of a few layer points, in turns by all ranks together and by each while the others rest. Without a pause
    before a repeat, for a stage alone waits for no other."""
    found, chosen = [], _choose_layers(points)
    for round_, index in itertools.product(range(_ALONE_ROUNDS), range(_ALONE_POINTS)):
        for turn in (None, *range(devices)):
            dist.barrier(group=context.side_group)
            if index < len(chosen) and turn in (None, context.rank):
                point = replace(chosen[index], part=TOGETHER if turn is None else ALONE)
                action, times = parts.action(chosen[index])
                timing = timer.time(action, _ALONE_SECONDS)
                seconds = timing.median_seconds / times, timing.minimum_seconds / times
                found.append(asdict(Sample(point, round_, timing.repeats, timing.undisturbed, *seconds, timing.spread)))
    return found


def _choose_layers(points: list[Point]) -> list[Point]:
    """Layers at the fewest and at the most bits: in decode the middle number of rows, in prefill the shortest pass that
    is no decode pass by its tokens."""
    chosen = []
    for phase, bits in itertools.product(("prefill", "decode"), (min, max)):
        layers = [point for point in points if point.part == "layer" and point.phase == phase]
        layers = [point for point in layers if point.bits == bits(other.bits for other in layers)]
        layers.sort(key=lambda point: (point.tokens, point.length_tokens))
        long = [point for point in layers if point.tokens >= _PREFILL_TOKENS]
        chosen += long[:1] if phase == "prefill" and long else layers[len(layers) // 2 :][:1]
    return list(dict.fromkeys(chosen))


def _time(
    timer: Timer, parts: Parts, point: Point, round_: int, seconds: float, new_sizes: NewSizes
) -> tuple[Sample, float]:
    """(sample, seconds that it took: of one thread, what it used of the processor and rested; else wall time)."""
    alone = timer.device.type == "cpu" and timer.threads == 1
    clock = time.thread_time if alone else time.perf_counter
    begin = clock()
    action, times = parts.action(point)
    timing = timer.time(action, seconds, warm_up=1)
    if round_ == 0:
        new_sizes.add(point, timing, timer.cpu_share)
    sample = Sample(
        point,
        round_,
        timing.repeats,
        timing.undisturbed,
        timing.median_seconds / times,
        timing.minimum_seconds / times,
        timing.spread,
    )
    spent = clock() - begin
    return sample, spent / timer.cpu_share + timing.repeats * timer.pause_seconds if alone else spent


def _guess(point: Point, last: dict[tuple[str, str, int], tuple[float, int]]) -> float:
    """Seconds of the point if time grew with its tokens from the last point of its kind on; 0 for the first one."""
    if (before := last.get((point.part, point.phase, point.bits))) is None:
        return 0.0
    return before[0] * point.tokens / before[1]


def _slowest(seconds: float, group: dist.ProcessGroup) -> float:
    """The largest of all ranks' figures; every rank waits for it."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return value.item()


def _load(wanted: dict[str, Any], plan: Plan, points: list[Point], device: torch.device) -> Parts:
    bits = sorted({point.bits for point in points if point.part == "layer"})
    return Parts(
        plan.model_path,
        read_shape(plan.model_path),
        bits,
        QuantConfig(**wanted["quant"]),
        plan.deployment.compute_dtype,
        device,
        wanted["rows"],
        wanted["capacity"],
        wanted["chained"],
        capture=CudaGraphs(device) if wanted["captured"] and device.type == "cuda" else None,
    )
