"""What others would do, on the same costs: uniform, PipeEdge, adabits, memory-proportional, single device, offload.

Every baseline but the offload estimate is an assignment that the independent checker accepts and the contract's formula
costs. Devices are taken in the order listed, except by PipeEdge, whose dynamic program chooses subset and order.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ds_llmpq.plan import Assignment, PredictedTotals, StageAssignment
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.feasibility import pairs, path_finder
from ds_llmpq.planner.objective import charge_head, evaluate, violations
from ds_llmpq.planner.problem import Objective, Problem

OFFLOAD_BYTES_PER_SECOND = 12e9  # host to device, assumed: PCIe 3 x16 in practice


@dataclass(frozen=True)
class Baseline:
    """`outcome`: the totals, or why there are none; an estimate has no assignment."""

    outcome: PredictedTotals | str
    assignment: Assignment | None = None


def all_baselines(problem: Problem) -> dict[str, Baseline]:
    """Name -> baseline, for every one there is."""
    return dict(each_baseline(problem))


def each_baseline(problem: Problem) -> Iterator[tuple[str, Baseline]]:
    """(name, baseline) as they are found; `pipeedge`, whose dynamic program takes longest, late."""
    rules: dict[str, Callable[[Problem], Iterable[Assignment]]] = {
        "uniform": uniform,
        "memory_proportional": memory_proportional,
        "single_device": single_device,
        "adabits": adabits,
        "pipeedge": pipeedge,
    }
    for name, rule in rules.items():
        yield name, _best(problem, rule)
    yield "offload_estimate", offload_estimate(problem)


def _best(problem: Problem, rule: Callable[[Problem], Iterable[Assignment]]) -> Baseline:
    """The fastest of what a rule proposes: micro-batches are the only thing left to choose."""
    unbounded = _without_limit(problem)
    fitting = [assignment for assignment in rule(problem) if not violations(unbounded, assignment)]
    found = [Baseline(evaluate(problem, assignment).summary(), assignment) for assignment in fitting]
    if not found:
        return Baseline("infeasible: no bit width and micro-batch fit the memory of this split")
    return min(found, key=lambda baseline: baseline.outcome.latency_seconds)


def _without_limit(problem: Problem) -> Problem:
    return replace(problem, objective=Objective("theta", theta=0.0))


def _with_most_bits(problem: Problem, split: Callable[[int, int, int], Assignment | None]) -> list[Assignment]:
    """The split at the highest bit width that fits, for all micro-batch pairs at which it does."""
    unbounded = _without_limit(problem)
    for bits in sorted(problem.bits, reverse=True):
        made = [split(bits, *pair) for pair in pairs(problem)]
        fitting = [assignment for assignment in made if assignment and not violations(unbounded, assignment)]
        if fitting:
            return fitting
    return []


def _cut(
    problem: Problem, sizes: list[int], bits: int, prefill_micro_batch: int, decode_micro_batch: int
) -> Assignment:
    """Stages of the given sizes on the devices in listed order, devices of size zero left out."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    stages = tuple(
        StageAssignment(device.name, int(edges[d]), int(edges[d + 1]), (bits,) * sizes[d])
        for d, device in enumerate(problem.devices)
        if sizes[d]
    )
    return Assignment(stages, prefill_micro_batch, decode_micro_batch)


def uniform(problem: Problem) -> list[Assignment]:
    """Equal layers on all devices, one bit width: the highest that fits."""
    count = len(problem.devices)
    sizes = [problem.layers // count + (d < problem.layers % count) for d in range(count)]
    return _with_most_bits(problem, lambda bits, *pair: _cut(problem, sizes, bits, *pair))


def _proportional_sizes(problem: Problem) -> list[int]:
    """Layers in proportion to memory, largest remainders first."""
    memory = np.array([device.memory_bytes for device in problem.devices], dtype=float)
    share = problem.layers * memory / memory.sum() if memory.sum() > 0 else np.zeros(len(memory))
    sizes = np.floor(share).astype(int)
    for d in np.argsort(sizes - share, kind="stable")[: problem.layers - int(sizes.sum())]:
        sizes[d] += 1
    return sizes.tolist()


def memory_proportional(problem: Problem) -> list[Assignment]:
    """Layers in proportion to memory, one bit width: the highest that fits."""
    sizes = _proportional_sizes(problem)
    if sum(sizes) != problem.layers:
        return []
    return _with_most_bits(problem, lambda bits, *pair: _cut(problem, sizes, bits, *pair))


def single_device(problem: Problem) -> Iterable[Assignment]:
    """Everything on one device, one bit width: the fastest that fits."""
    for device in {(d.type, d.memory_bytes): d for d in reversed(problem.devices)}.values():
        for bits in problem.bits:
            for pair in pairs(problem):
                stage = StageAssignment(device.name, 0, problem.layers, (bits,) * problem.layers)
                yield Assignment((stage,), *pair)


def adabits(problem: Problem) -> Iterable[Assignment]:
    """Quality alone: on the memory-proportional split, the bit widths of least quality loss that fit, by exchange."""
    sizes = _proportional_sizes(problem)
    if sum(sizes) != problem.layers:
        return
    edges = np.concatenate([[0], np.cumsum(sizes)])
    for pair in pairs(problem):
        arrays = pair_arrays(problem, *pair)
        stages = []
        for d, device in enumerate(problem.devices):
            first, last = int(edges[d]), int(edges[d + 1])
            if first == last:
                continue
            room = arrays.capacity[d] - (arrays.embed_bytes if first == 0 else 0.0)
            room -= charge_head(arrays, first == 0, last == problem.layers)
            bits = _best_quality(
                arrays.layer_bytes[first:last], arrays.sensitivity[first:last], arrays.available[d], room
            )
            if bits is None:
                break
            stages.append(StageAssignment(device.name, first, last, tuple(problem.bits[b] for b in bits)))
        else:
            yield Assignment(tuple(stages), *pair)


def _best_quality(
    layer_bytes: np.ndarray, sensitivity: np.ndarray, usable: np.ndarray, room: float
) -> list[int] | None:
    """From the smallest bit widths, always the exchange that saves most loss a byte."""
    if not usable.any():
        return None
    rows = np.arange(len(layer_bytes))
    sizes = np.where(usable, layer_bytes, np.inf)
    widths = sizes.argmin(axis=1)
    room -= sizes[rows, widths].sum()
    if room < 0:
        return None
    while True:
        more = sizes - sizes[rows, widths][:, None]
        saved = sensitivity[rows, widths][:, None] - sensitivity
        worth = np.where((more <= room) & (saved > 0), saved / np.maximum(more, 1e-9), 0.0)
        i, b = np.unravel_index(int(np.argmax(worth)), worth.shape)
        if worth[i, b] <= 0:
            return widths.tolist()
        room -= more[i, b]
        widths[i] = b


def pipeedge(problem: Problem) -> Iterable[Assignment]:
    """One bit width, the highest that fits, and the cut, subset and order of least slowest stage: a dynamic program.

    A stage's time is prefill plus all decode steps of one micro-batch; links are not part of the choice.
    """
    for bits in sorted(problem.bits, reverse=True):
        found = [a for a in (_min_max(problem, bits, *pair) for pair in pairs(problem)) if a is not None]
        if found:
            yield from found
            return


def _min_max(problem: Problem, bits: int, prefill_micro_batch: int, decode_micro_batch: int) -> Assignment | None:
    """Bisection on the slowest stage; a threshold is met if the devices cover all layers within it."""
    column = problem.bits.index(bits)
    arrays = pair_arrays(problem, prefill_micro_batch, decode_micro_batch)
    steps = arrays.generated_tokens - 1
    # Widths beside the one asked for are removed; a stage may take as long as the threshold says.
    per_layer = _passes(arrays.prefill[:, column], arrays.decode[:, column], steps)
    ends = (_passes(*arrays.embed, steps), _passes(*arrays.head, steps))
    usable = np.isfinite(per_layer)
    if not usable.any():
        return None

    cover = path_finder(problem, arrays, column, per_layer, ends)
    low = 0.0
    high = float(problem.layers * per_layer[usable].max() + sum(part[np.isfinite(part)].sum() for part in ends))
    if cover(high) is None:
        return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if cover(middle) is not None else (middle, high)
    stages = tuple(
        StageAssignment(problem.devices[d].name, first, last, (bits,) * (last - first))
        for d, first, last in cover(high)
    )
    return Assignment(stages, prefill_micro_batch, decode_micro_batch)


def _passes(prefill: np.ndarray, decode: np.ndarray, steps: int) -> np.ndarray:
    """One prefill and `steps` decode passes; infinite where either is not available."""
    available = np.isfinite(prefill) & np.isfinite(decode)
    return np.where(available, prefill + steps * np.where(available, decode, 0.0), np.inf)


def offload_estimate(problem: Problem) -> Baseline:
    """FlexGen-style, an ESTIMATE: one device, the whole batch layer by layer, what does not fit streams from the host.

    `problem.json` knows no host link, so 12 GB/s is assumed, perfectly overlapped with compute; no plan of this kind
    can be run by the engine.
    """
    best: PredictedTotals | None = None
    for pair in pairs(problem):
        arrays = pair_arrays(problem, *pair)
        for d in range(len(problem.devices)):
            for b in np.flatnonzero(arrays.available[d]):
                predicted = _offload(arrays, d, int(b), problem.workload.sequences)
                if predicted and (best is None or predicted.latency_seconds < best.latency_seconds):
                    best = predicted
    return Baseline(best or "infeasible: no device can hold its own workspace with embedding and head")


def _offload(arrays: PairArrays, d: int, b: int, sequences: int) -> PredictedTotals | None:
    room = arrays.capacity[d] - arrays.embed_bytes - charge_head(arrays, first=True, last=True)
    if room < 0 or not np.isfinite(arrays.embed[:, d] + arrays.head[:, d]).all():
        return None
    total = float(arrays.layer_bytes[:, b].sum())
    streamed = max(0.0, total - room) / OFFLOAD_BYTES_PER_SECOND
    ends = arrays.embed[:, d] + arrays.head[:, d]
    layers = len(arrays.layer_bytes)
    prefill = max(arrays.prefill_rounds * (layers * arrays.prefill[d, b] + ends[0]), streamed)
    decode = (arrays.generated_tokens - 1) * max(
        arrays.decode_rounds * (layers * arrays.decode[d, b] + ends[1]), streamed
    )
    latency = float(prefill + decode)
    return PredictedTotals(
        latency_seconds=latency,
        prefill_seconds=float(prefill),
        decode_seconds=float(decode),
        throughput_tokens_per_second=sequences * arrays.generated_tokens / latency if latency else math.inf,
        quality_loss=float(arrays.sensitivity[:, b].sum()),
    )
