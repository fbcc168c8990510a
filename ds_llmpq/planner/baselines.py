"""What others would do, on the same costs: `planner.baseline` gives their plan, and every plan is compared with them.

Each is an assignment that the independent checker accepts and the contract's formula costs, at the micro-batches that
suit it best; FlexGen's are estimates. Devices are taken in the order listed, except by PipeEdge and by LLM-PQ's
heuristic, which choose it. A baseline knows no limit of loss or latency.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.plan import BASELINES, ESTIMATES, Assignment, PredictedTotals, StageAssignment
from ds_llmpq.planner.adabits import adabits, split_by_memory
from ds_llmpq.planner.feasibility import pairs
from ds_llmpq.planner.llmpq_heuristic import llmpq_heuristic
from ds_llmpq.planner.objective import evaluate, rounds, violations, with_totals
from ds_llmpq.planner.pipeedge import pipeedge
from ds_llmpq.planner.problem import Objective, Problem

OFFLOAD_BYTES_PER_SECOND = 12e9  # host to device, assumed: PCIe 3 x16 in practice


@dataclass(frozen=True)
class Baseline:
    """`outcome`: the totals, or why there are none; an estimate has no assignment."""

    outcome: PredictedTotals | str
    assignment: Assignment | None = None


def all_baselines(problem: Problem) -> dict[str, Baseline]:
    """Name -> baseline, for those that every plan is compared with: all but `llmpq_heuristic`, the slowest."""
    return {name: find_baseline(problem, name) for name in BASELINES}


def find_baseline(problem: Problem, name: str) -> Baseline:
    """`UserError`: there is none of that name."""
    if name in ESTIMATES:
        return flexgen(problem, ESTIMATES[name])
    if name not in RULES:
        raise UserError(f"planner.baseline is {name!r}, but must be null or one of {', '.join((*RULES, *ESTIMATES))}.")
    return _best(problem, RULES[name])


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
    sizes = _equal_sizes(problem)
    return _with_most_bits(problem, lambda bits, *pair: _cut(problem, sizes, bits, *pair))


def _equal_sizes(problem: Problem) -> list[int]:
    count = len(problem.devices)
    return [problem.layers // count + (d < problem.layers % count) for d in range(count)]


def memory_proportional(problem: Problem) -> list[Assignment]:
    """Layers in proportion to memory, one bit width: the highest that fits."""
    sizes = split_by_memory(problem)
    return _with_most_bits(problem, lambda bits, *pair: _cut(problem, sizes, bits, *pair)) if sizes else []


def single_device(problem: Problem) -> Iterable[Assignment]:
    """Everything on one device, one bit width: the fastest that fits."""
    for device in {(d.type, d.memory_bytes): d for d in reversed(problem.devices)}.values():
        for bits in problem.bits:
            if sum(problem.memory.layer_bytes[bits]) > device.memory_bytes:
                continue
            for pair in pairs(problem):
                stage = StageAssignment(device.name, 0, problem.layers, (bits,) * problem.layers)
                yield Assignment((stage,), *pair)


def flexgen(problem: Problem, bits: int) -> Baseline:
    """FlexGen-style, an ESTIMATE: equal layers on all devices, weights that do not fit stream from the host's memory.

    They are read once a pass for all micro-batches, at an assumed rate and perfectly overlapped with compute; the KV
    cache stays on the device. The engine does not offload, so there is no plan to run.
    """
    if bits not in problem.bits:
        return Baseline(f"none: {bits} bits are not among the choices")
    found = [_estimate(problem, bits, pair) for pair in pairs(problem)]
    best = min((entry for entry in found if entry), key=lambda entry: entry.latency_seconds, default=None)
    return Baseline(best or "infeasible: a device cannot hold its cache and workspace, or has no times at that width")


def _estimate(problem: Problem, bits: int, pair: tuple[int, int]) -> PredictedTotals | None:
    cut = _cut(problem, _equal_sizes(problem), bits, *pair)
    seen = evaluate(problem, cut)
    m_p, m_d = rounds(problem, *pair)
    prefill, decode = [], []
    for j, stage in enumerate(cut.stages):
        memory = seen.stage_memory_bytes[j]
        room = problem.by_name[stage.device].memory_bytes
        room -= sum(held for part, held in memory.items() if part != "weights")
        streamed = max(0.0, memory["weights"] - room) / OFFLOAD_BYTES_PER_SECOND
        if room < 0:
            return None
        prefill.append(max(seen.stage_prefill_seconds[j], streamed / m_p))
        decode.append(max(seen.stage_decode_seconds[j], streamed / m_d))
    slow = replace(seen, stage_prefill_seconds=tuple(prefill), stage_decode_seconds=tuple(decode))
    timed = with_totals(problem, cut, slow).summary()
    return timed if math.isfinite(timed.latency_seconds) else None


QUICK_BASELINES = ("uniform", "memory_proportional", "single_device")
RULES: dict[str, Callable[[Problem], Iterable[Assignment]]] = {
    "uniform": uniform,
    "memory_proportional": memory_proportional,
    "single_device": single_device,
    "adabits": adabits,
    "pipeedge": pipeedge,
    "llmpq_heuristic": llmpq_heuristic,
}
