"""Is there any plan, and if not, what is missing and what is the smallest change that makes one possible?

With every layer at its smallest available width, a device's reach grows with the layer it begins at. So the furthest
layer a multiset of devices can cover decides memory feasibility exactly, for all orders at once.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ds_llmpq.errors import InfeasibleError
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.objective import charge_head
from ds_llmpq.planner.problem import DeviceSpeeds, Problem
from ds_llmpq.wording import format_size, pluralize

STATE_LIMIT = 50_000
_BLOCKS = 128  # positions: a multiple of every kernel's cache block


def pairs(problem: Problem) -> list[tuple[int, int]]:
    """All (prefill micro-batch, decode micro-batch)."""
    return list(itertools.product(problem.micro_batches.prefill, problem.micro_batches.decode))


def memory_feasible(problem: Problem) -> bool:
    """True if some plan fits the memory, whatever it costs."""
    return any(furthest_layer(problem, *pair) == problem.layers for pair in pairs(problem))


def furthest_layer(problem: Problem, prefill_micro_batch: int, decode_micro_batch: int) -> int:
    """The most layers, counted from the first, that the devices can hold at this micro-batch pair.

    Beyond the state limit this is optimistic: all layers, if the longest stages of all devices add up to them.
    """
    arrays = pair_arrays(problem, prefill_micro_batch, decode_micro_batch)
    least = np.where(arrays.available[:, None, :], arrays.layer_bytes[None], np.inf).min(axis=2)  # [D, L]
    reaches = list_reaches(problem, arrays, least)
    if problem.device_order == "free" and count_states(map(len, _kinds(reaches).values())) > STATE_LIMIT:
        longest = sum(int((reach - np.arange(len(reach))).max()) for reach in reaches)
        if longest >= problem.layers:
            return problem.layers
    return _furthest(problem, reaches)


def list_reaches(problem: Problem, arrays: PairArrays, least: np.ndarray) -> list[np.ndarray]:
    """One reach per device for layers of `least[D, L]` bytes; devices of equal type and memory share an array."""
    known: dict[tuple, np.ndarray] = {}
    kinds = [(device.type, device.memory_bytes) for device in problem.devices]
    for d, kind in enumerate(kinds):
        if kind not in known:
            known[kind] = _reach(arrays, d, least[d])
    return [known[kind] for kind in kinds]


def _kinds(reaches: list[np.ndarray]) -> dict[bytes, list[int]]:
    """Devices by reach; equal ones mostly share an array, so that few have to be compared."""
    known: dict[int, bytes] = {}
    members: dict[bytes, list[int]] = {}
    for d, reach in enumerate(reaches):
        name = known.get(id(reach)) or known.setdefault(id(reach), reach.tobytes())
        members.setdefault(name, []).append(d)
    return members


def count_states(counts: Iterable[int]) -> float:
    """How many combinations of numbers of used devices of each kind there are."""
    return math.prod(count + 1.0 for count in counts)


def _reach(arrays: PairArrays, d: int, least: np.ndarray) -> np.ndarray:
    """reach[a]: the largest b such that layers [a, b) of `least` bytes fit on device d (a itself if none does)."""
    layers = len(least)
    reach = np.arange(layers + 1)
    if np.isinf(least).any() or arrays.capacity[d] < 0:
        return reach
    used = np.concatenate([[0.0], np.cumsum(least)])
    has_embed, has_head = np.isfinite(arrays.embed[:, d]).all(), np.isfinite(arrays.head[:, d]).all()
    first = np.arange(layers)
    room = np.full(layers, arrays.capacity[d])
    room[0] -= arrays.embed_bytes
    head = np.where(first == 0, *(charge_head(arrays, first=is_first, last=True) for is_first in (True, False)))
    fitting = np.searchsorted(used, used[:-1] + room, side="right") - 1
    # sums round otherwise than the differences that count: the next layer may just fit, or the last one not
    while (more := (fitting < layers) & (used[np.minimum(fitting + 1, layers)] - used[:-1] <= room)).any():
        fitting += more
    while (less := (fitting > first) & (used[fitting] - used[:-1] > room)).any():
        fitting -= less
    reach[:-1] = np.maximum(first, np.minimum(fitting, layers - 1))
    if has_head:
        reach[:-1][used[layers] - used[:-1] + head <= room] = layers
    if not has_embed:
        reach[0] = 0
    return reach


def _furthest(problem: Problem, reaches: list[np.ndarray]) -> int:
    """The most layers that stages cover, over all subsets and orders the problem permits."""
    if problem.device_order == "fixed":
        return _in_order(reaches, range(len(reaches)))
    devices = list(_kinds(reaches).values())
    if count_states(map(len, devices)) > STATE_LIMIT:  # the kinds one after the other, beginning with each of them
        turns = range(len(devices))
        return max(_in_order(reaches, [d for group in devices[t:] + devices[:t] for d in group]) for t in turns)
    reach = np.array([reaches[group[0]] for group in devices])
    columns = np.arange(len(reach))
    before, levels = states_by_total(tuple(len(group) for group in devices))
    furthest = np.zeros(len(before), dtype=np.int64)
    for states in levels:
        furthest[states] = np.where(before[states] >= 0, reach[columns, furthest[before[states]]], -1).max(axis=1)
    return int(furthest.max())


def _in_order(reaches: list[np.ndarray], order: Iterable[int]) -> int:
    layer = 0
    for d in order:
        layer = int(reaches[d][layer])
    return layer


@lru_cache(maxsize=64)
def states_by_total(counts: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """For numbers of used devices of each kind as flat states: [S, K] the state with one device of the kind less (-1
    where there is none), and the states by how many devices they use, from one on."""
    sizes = [count + 1 for count in counts]
    used = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=1)
    strides = np.array([math.prod(sizes[k + 1 :]) for k in range(len(sizes))])
    before = np.where(used > 0, np.arange(len(used))[:, None] - strides, -1)
    total = used.sum(axis=1)
    order = np.argsort(total, kind="stable")
    return before, np.split(order, np.flatnonzero(np.diff(total[order])) + 1)[1:]


def explain_memory(problem: Problem) -> InfeasibleError:
    """The error for a problem whose memory does not suffice: the shortfall, and the smallest relaxations."""
    runnable = [pair for pair in pairs(problem) if pair_arrays(problem, *pair).available.any()]
    if not runnable:
        return InfeasibleError(
            "No device can run any layer: no bit width has both a prefill and a decode time at the candidate "
            "micro-batches; add latency entries, bit widths or micro-batch sizes."
        )
    pair = max(runnable, key=lambda pair: furthest_layer(problem, *pair))
    arrays = pair_arrays(problem, *pair)
    smallest = _smallest_total(arrays)
    room = float(np.clip(arrays.capacity, 0, None).sum())
    held = f"{furthest_layer(problem, *pair)} of {pluralize(problem.layers, 'layer')}"
    return InfeasibleError(
        f"No plan fits the memory: with every layer at its smallest bit width and micro-batches of {pair[0]} in "
        f"prefill and {pair[1]} in decode the devices hold {held}; "
        f"{_shortfall(problem, arrays, smallest, room)}; {_remedies(problem)}."
    )


def _smallest_total(arrays: PairArrays) -> float:
    widths = arrays.available.any(axis=0)
    ends = arrays.embed_bytes + charge_head(arrays, first=len(arrays.capacity) == 1, last=True)
    return float(arrays.layer_bytes[:, widths].min(axis=1).sum() + ends)


def _shortfall(problem: Problem, arrays: PairArrays, smallest: float, room: float) -> str:
    extra = _smallest_increase(problem)
    lead = (
        f"weights, KV cache, embedding and head need {format_size(smallest)} of the {format_size(room)} left after the "
        "workspace"
    )
    if extra is None:
        return f"{lead}, and more memory alone would not help"
    tightest = problem.devices[int(np.argmin(arrays.capacity))].name
    return f"{lead}, each device lacks about {format_size(extra)}, {tightest!r} being the smallest"


def _smallest_increase(problem: Problem) -> int | None:
    """Bytes that every device needs more, to about one in a thousand."""

    def with_more(extra: int) -> Problem:
        devices = tuple(replace(device, memory_bytes=device.memory_bytes + extra) for device in problem.devices)
        return replace(problem, devices=devices)

    high = 1 << 20
    while not memory_feasible(with_more(high)):
        high *= 4
        if high > 1 << 50:
            return None
    return _least(lambda extra: memory_feasible(with_more(extra)), 0, high, max(1, high >> 10))


def _least(holds: Callable[[int], bool], low: int, high: int, step: int = 1) -> int:
    """The least integer (within `step`) in (low, high] for which a monotone property holds; it holds at `high`."""
    while high - low > step:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _remedies(problem: Problem) -> str:
    """Smaller batch, shorter context, fewer bits: each the smallest change that suffices alone."""
    found = _smaller_pool(problem) if problem.workload.pool_positions else _smaller_batch(problem)
    found += _fewer_bits(problem)
    return ("it would fit with " + ", or ".join(found)) if found else "add devices or memory"


def _smaller_pool(problem: Problem) -> list[str]:
    """Where sequences share the KV cache, its size alone decides, however many they are."""
    workload, memory = problem.workload, problem.memory
    pool, shared = workload.pool_positions, workload.prefix_positions(1)
    least = -(-workload.row_positions(1) // _BLOCKS)

    def fits(blocks: int) -> bool:
        kv = memory.kv_bytes_per_sequence_layer * (blocks * _BLOCKS + shared) / (pool + shared)
        return memory_feasible(replace(problem, memory=replace(memory, kv_bytes_per_sequence_layer=kv)))

    if least * _BLOCKS >= pool or not fits(least):
        return []
    most = -(-pool // _BLOCKS)
    kept = most - _least(lambda cut: fits(most - cut), 0, most - least)
    return [f"workload.pool_positions={kept * _BLOCKS} instead of {pool}"]


def _smaller_batch(problem: Problem) -> list[str]:
    found = []
    workload, memory = problem.workload, problem.memory
    batch = workload.sequences

    def kept(sequences: int) -> bool:
        return memory_feasible(replace(problem, workload=replace(workload, sequences=sequences)))

    if batch > 1 and kept(1):
        most = batch - _least(lambda cut: kept(batch - cut), 0, batch - 1)
        found.append(f"at most {pluralize(most, 'sequence')} instead of {batch}")
    context = workload.prompt_tokens + workload.generated_tokens

    def shortened(tokens: int) -> bool:
        kv = memory.kv_bytes_per_sequence_layer * tokens / context
        return memory_feasible(replace(problem, memory=replace(memory, kv_bytes_per_sequence_layer=kv)))

    if context > 2 and shortened(2):
        tokens = context - _least(lambda cut: shortened(context - cut), 0, context - 2)
        found.append(f"a context of at most {tokens} tokens instead of {context}")
    return found


def _fewer_bits(problem: Problem) -> list[str]:
    """A bit width below the smallest, its weights in proportion; or, ungated, one that the problem lists already."""
    for width in sorted(problem.bits, reverse=True):
        opened = {
            name: replace(
                kind, bits=tuple(b for b in problem.bits if b in kind.bits or (b == width and _has_times(kind, b)))
            )
            for name, kind in problem.device_types.items()
        }
        if opened != problem.device_types and memory_feasible(replace(problem, device_types=opened)):
            return [f"{width} bits on the types that exclude them"]
    smallest = min(problem.bits, key=lambda b: sum(problem.memory.layer_bytes[b]))
    for width in range(smallest - 1, 0, -1):
        share = tuple(size * width / smallest for size in problem.memory.layer_bytes[smallest])
        layers = {b: share if b == smallest else sizes for b, sizes in problem.memory.layer_bytes.items()}
        if memory_feasible(replace(problem, memory=replace(problem.memory, layer_bytes=layers))):
            return [f"{width}-bit weights"]
    return []


def _has_times(kind: DeviceSpeeds, width: int) -> bool:
    return bool(kind.prefill_layer_seconds.get(width)) and bool(kind.decode_layer_seconds.get(width))
