"""Is there any plan, and if not, what is missing and what is the smallest change that makes one possible?

With every layer at its smallest available width, a device's reach grows with the layer it begins at. So the furthest
layer a multiset of devices can cover decides memory feasibility exactly, for all orders at once.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ds_llmpq.errors import InfeasibleError
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.problem import DeviceType, Problem

STATE_LIMIT = 300_000


def pairs(problem: Problem) -> list[tuple[int, int]]:
    """All (eta, xi)."""
    return list(itertools.product(problem.micro_batches.prefill, problem.micro_batches.decode))


def memory_feasible(problem: Problem) -> bool:
    """True if some plan fits the memory, whatever it costs."""
    return any(furthest_layer(problem, eta, xi) == problem.layers for eta, xi in pairs(problem))


def furthest_layer(problem: Problem, eta: int, xi: int) -> int:
    """The most layers, counted from the first, that the devices can hold at this micro-batch pair."""
    arrays = pair_arrays(problem, eta, xi)
    reaches = [_reach(arrays, d) for d in range(len(problem.devices))]
    if problem.device_order == "fixed":
        layer = 0
        for reach in reaches:
            layer = max(layer, int(reach[layer]))
        return layer
    kinds: dict[tuple[int, ...], int] = {}
    for reach in reaches:
        kinds[tuple(reach)] = kinds.get(tuple(reach), 0) + 1
    return _furthest(list(kinds), list(kinds.values()))


def _reach(arrays: PairArrays, d: int) -> np.ndarray:
    """reach[a]: the largest b such that layers [a, b) fit on device d (a itself if none does)."""
    layers = len(arrays.layer_bytes)
    reach = np.arange(layers + 1)
    widths = arrays.available[d]
    if not widths.any() or arrays.capacity[d] < 0:
        return reach
    used = np.concatenate([[0.0], np.cumsum(arrays.layer_bytes[:, widths].min(axis=1))])
    has_embed, has_head = np.isfinite(arrays.embed[:, d]).all(), np.isfinite(arrays.head[:, d]).all()
    for a in range(layers):
        if a == 0 and not has_embed:
            continue
        room = arrays.capacity[d] - (arrays.embed_bytes if a == 0 else 0.0)
        head = 0.0 if a == 0 and arrays.tied_head else arrays.head_bytes
        if has_head and used[layers] - used[a] + head <= room:
            reach[a] = layers
        else:
            reach[a] = max(a, min(int(np.searchsorted(used - used[a], room, side="right")) - 1, layers - 1))
    return reach


def _furthest(kinds: list[tuple[int, ...]], counts: list[int]) -> int:
    """Furthest layer over all orders of the devices; beyond the state limit, over a few greedy orders only."""
    layers = len(kinds[0]) - 1
    if np.prod([count + 1.0 for count in counts]) > STATE_LIMIT:
        return _furthest_greedy(kinds, counts)
    best = {(0,) * len(kinds): 0}
    for state in itertools.product(*(range(count + 1) for count in counts)):
        for k, used in enumerate(state):
            if used:
                before = (*state[:k], used - 1, *state[k + 1 :])
                best[state] = max(best.get(state, 0), kinds[k][best[before]])
        if best[state] == layers:
            return layers
    return max(best.values())


def _furthest_greedy(kinds: list[tuple[int, ...]], counts: list[int]) -> int:
    """Try each kind at either end, the others in any order between."""
    layers, best = len(kinds[0]) - 1, 0
    for first, last in itertools.product(range(len(kinds)), repeat=2):
        left = list(counts)
        order = [first]
        left[first] -= 1
        if left[last] > 0:
            left[last] -= 1
        order += [k for k, count in enumerate(left) for _ in range(count)] + [last]
        layer = 0
        for k in order:
            layer = max(layer, kinds[k][layer])
        best = max(best, layer)
        if best == layers:
            break
    return best


def explain_memory(problem: Problem) -> InfeasibleError:
    """The error for a problem whose memory does not suffice: the shortfall, and the smallest relaxations."""
    runnable = [pair for pair in pairs(problem) if pair_arrays(problem, *pair).available.any()]
    if not runnable:
        return InfeasibleError(
            "No device can run any layer: no bit width has both a prefill and a decode time at the candidate "
            "micro-batches; add latency entries, bit widths or micro-batch sizes."
        )
    eta, xi = max(runnable, key=lambda pair: furthest_layer(problem, *pair))
    held = furthest_layer(problem, eta, xi)
    arrays = pair_arrays(problem, eta, xi)
    smallest = _smallest_total(arrays)
    room = float(np.clip(arrays.capacity, 0, None).sum())
    return InfeasibleError(
        f"No plan fits the memory: with every layer at its smallest width and micro-batches ({eta}, {xi}) the devices "
        f"hold {held} of {problem.layers} layers; {_shortfall(problem, arrays, smallest, room)}; {_remedies(problem)}."
    )


def _smallest_total(arrays: PairArrays) -> float:
    widths = arrays.available.any(axis=0)
    ends = arrays.embed_bytes + (0.0 if arrays.tied_head and len(arrays.capacity) == 1 else arrays.head_bytes)
    return float(arrays.layer_bytes[:, widths].min(axis=1).sum() + ends)


def _shortfall(problem: Problem, arrays: PairArrays, smallest: float, room: float) -> str:
    extra = _smallest_increase(problem)
    lead = f"weights, KV cache, embedding and head need {smallest:,.0f} bytes of {room:,.0f} left after the workspace"
    if extra is None:
        return f"{lead}, and more memory alone would not help"
    tightest = problem.devices[int(np.argmin(arrays.capacity))].name
    return f"{lead}, each device lacks about {extra:,.0f} bytes, {tightest!r} being the smallest"


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
    found = []
    workload, memory = problem.workload, problem.memory
    batch = workload.sequences

    def kept(sequences: int) -> bool:
        return memory_feasible(replace(problem, workload=replace(workload, sequences=sequences)))

    if batch > 1 and kept(1):
        found.append(
            f"at most {batch - _least(lambda cut: kept(batch - cut), 0, batch - 1)} sequences instead of {batch}"
        )
    context = workload.prompt_tokens + workload.generated_tokens

    def shortened(tokens: int) -> bool:
        kv = memory.kv_bytes_per_sequence_layer * tokens / context
        return memory_feasible(replace(problem, memory=replace(memory, kv_bytes_per_sequence_layer=kv)))

    if context > 2 and shortened(2):
        tokens = context - _least(lambda cut: shortened(context - cut), 0, context - 2)
        found.append(f"a context of at most {tokens} tokens instead of {context}")
    found += _fewer_bits(problem)
    return ("it would fit with " + ", or ".join(found)) if found else "add devices or memory"


def _fewer_bits(problem: Problem) -> list[str]:
    """A width below the smallest, its weights in proportion; or, ungated, one that the problem lists already."""
    for width in sorted(problem.bits, reverse=True):
        opened = {
            name: replace(
                kind, bits=tuple(b for b in problem.bits if b in kind.bits or (b == width and _timed(kind, b)))
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


def _timed(kind: DeviceType, width: int) -> bool:
    return bool(kind.prefill_layer_seconds.get(width)) and bool(kind.decode_layer_seconds.get(width))
