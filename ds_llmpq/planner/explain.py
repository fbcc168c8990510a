"""Why this plan: the bottleneck and what limits it, what more memory or another theta would be worth."""

from collections.abc import Iterator

import numpy as np

from ds_llmpq.planner.arrays import pair_arrays
from ds_llmpq.planner.compositions import Compositions
from ds_llmpq.planner.objective import Assignment, Prediction, evaluate
from ds_llmpq.planner.plan import Plan, PlanStage
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.rounding import refine
from ds_llmpq.planner.stages import NEVER, Box, StageBounds

GIGABYTE = 1e9


def explain_plan(problem: Problem, plan: Plan, formula: str) -> list[str]:
    """Sentences about the plan, the most important first."""
    assignment = plan.assignment()
    prediction = evaluate(problem, assignment, formula)
    sentences = [_balance(problem, assignment, prediction)]
    sentences += [_bottleneck(problem, plan, prediction, phase) for phase in ("prefill", "decode")]
    sentences += _left_out(problem, plan)
    sentences += _memory_worth(problem, plan, prediction)
    sentences += _theta_worth(problem, plan)
    sentences += _against_baselines(problem, plan)
    return sentences


def _balance(problem: Problem, assignment: Assignment, seen: Prediction) -> str:
    share = 100 * seen.decode_seconds / seen.latency_seconds if seen.latency_seconds > 0 else 0.0
    ring = sum(seen.stage_decode_seconds) + sum(seen.link_decode_seconds)
    groups = -(-problem.workload.sequences // assignment.decode_micro_batch)
    slowest = groups * max(*seen.stage_decode_seconds, *seen.link_decode_seconds)
    bound = "the slowest stage working through all micro-batches" if slowest >= ring else "one trip around the ring"
    return (
        f"Decoding takes {share:.0f} % of {seen.latency_seconds:.4g} s; a decode round of {max(ring, slowest):.4g} s "
        f"is bound by {bound} ({groups} micro-batches of {assignment.decode_micro_batch})."
    )


def _bottleneck(problem: Problem, plan: Plan, seen: Prediction, phase: str) -> str:
    """The slowest resource of a phase and what keeps it from being faster."""
    stages = getattr(seen, f"stage_{phase}_seconds")
    links = getattr(seen, f"link_{phase}_seconds")
    j = int(np.argmax(stages))
    if max(links) > stages[j]:
        k = int(np.argmax(links))
        after = plan.stages[(k + 1) % len(plan.stages)].device
        return (
            f"The {phase} bottleneck is the link from {plan.stages[k].device} to {after} with {links[k]:.4g} s a "
            f"micro-batch, more than any stage: the network limits it."
        )
    stage = plan.stages[j]
    return (
        f"The {phase} bottleneck is stage {j} on {stage.device} with {stages[j]:.4g} s a micro-batch "
        f"({len(stage.bits)} layers, {_widths(stage)}); {_limit(problem, plan, stage, phase)}."
    )


def _widths(stage: PlanStage) -> str:
    counts = {bits: stage.bits.count(bits) for bits in sorted(set(stage.bits))}
    return ", ".join(f"{count} x {bits} bits" for bits, count in counts.items())


def _limit(problem: Problem, plan: Plan, stage: PlanStage, phase: str) -> str:
    """Memory, if a faster width of this stage or one layer more elsewhere does not fit; else compute."""
    kind = problem.device_types[stage.device_type]
    size = plan.micro_batch[phase]
    times = {b: getattr(kind, f"{phase}_layer_seconds").get(b, {}).get(size) for b in kind.bits}
    usable = {b: seconds for b, seconds in times.items() if seconds is not None}
    fastest = min(usable, key=lambda b: usable[b])
    size_of = {b: max(problem.memory.layer_bytes[b]) for b in usable}
    slower = [b for b in stage.bits if usable[b] > usable[fastest]]
    free = stage.memory_budget_bytes - sum(stage.memory_bytes.values())
    if slower and size_of[fastest] - size_of[slower[0]] > free:
        return f"memory limits it: {fastest} bits would be faster, but only {free:,.0f} bytes are free"
    lightest = min(size_of.values()) + problem.memory.kv_bytes_per_sequence_layer * problem.workload.sequences
    others = [s for s in plan.stages if s is not stage]
    spare = [s for s in others if s.memory_budget_bytes - sum(s.memory_bytes.values()) >= lightest]
    if others and not spare:
        return "memory limits it: no other stage has room for one of its layers"
    return "compute and memory bandwidth limit it: moving a layer elsewhere would not pay"


def _left_out(problem: Problem, plan: Plan) -> list[str]:
    used = {stage.device for stage in plan.stages}
    idle = [device.name for device in problem.devices if device.name not in used]
    if not idle:
        return []
    names = ", ".join(idle[:6]) + (", ..." if len(idle) > 6 else "")
    return [f"{len(idle)} of {len(problem.devices)} devices are left out, because more stages would not pay: {names}."]


def _memory_worth(problem: Problem, plan: Plan, seen: Prediction) -> list[str]:
    """Dual prices of the stages' memory, at the plan's own thresholds: a first-order estimate per device."""
    if problem.objective.mode != "theta":
        return []
    found = [(worth, stage.device) for stage, worth in _memory_prices(problem, plan, seen) if worth > 0]
    if not found:
        return ["One GB more on any device would gain nothing to first order: no stage is short of memory."]
    found.sort(reverse=True)
    listed = ", ".join(f"{worth:.3g} on {device}" for worth, device in found[:4])
    return [f"One GB more memory would lower the objective by about (dual price): {listed}."]


def _memory_prices(problem: Problem, plan: Plan, seen: Prediction) -> Iterator[tuple[PlanStage, float]]:
    arrays = pair_arrays(problem, plan.micro_batch["prefill"], plan.micro_batch["decode"])
    index = {device.name: d for d, device in enumerate(problem.devices)}
    allowed = np.ones(arrays.omega.shape, dtype=bool)
    kinds = {(s.device_type, s.memory_budget_bytes): index[s.device] for s in plan.stages}
    numbers = {kind: q for q, kind in enumerate(kinds)}
    bounds = StageBounds(
        arrays, list(kinds.values()), allowed, [None] * len(kinds), Compositions(arrays.omega, allowed, NEVER)
    )
    bounds.set_theta(problem.objective.theta)
    box = Box(0.0, max(seen.stage_prefill_seconds), 0.0, max(seen.stage_decode_seconds))
    weight = float(arrays.generated_tokens - 1)
    for stage in plan.stages:
        q = numbers[stage.device_type, stage.memory_budget_bytes]
        refine(bounds, q, *stage.layers, box, weight, np.inf)
        limits = bounds.limits(q, box, stage.layers[0] == 0, stage.layers[1] == problem.layers)
        surplus = bounds.pools[q] - np.array([1.0, weight, 0.0])
        prices = bounds.layer_prices(q, bounds.pools[q])[:, slice(*stage.layers)].min(axis=2).sum(axis=1)
        value = np.where((surplus >= -1e-12).all(axis=1), prices - surplus @ limits, -np.inf)
        yield stage, float(surplus[int(np.argmax(value)), 2]) * GIGABYTE / bounds.unit


def _theta_worth(problem: Problem, plan: Plan) -> list[str]:
    if problem.objective.mode != "theta":
        return []
    loss, theta = plan.predicted["quality_loss"], problem.objective.theta
    return [
        f"Theta {theta:g} charges {theta * loss:.4g} for a quality loss of {loss:.4g}: one per cent more theta costs "
        f"{0.01 * theta * loss:.3g} at this plan."
    ]


def _against_baselines(problem: Problem, plan: Plan) -> list[str]:
    """Speed-up over the fastest baseline that is a real plan, with both quality losses."""
    real = {
        name: entry
        for name, entry in plan.baselines.items()
        if not isinstance(entry, str) and name != "offload_estimate" and entry["latency_seconds"] > 0
    }
    if not real or plan.predicted["latency_seconds"] <= 0:
        return []
    name = min(real, key=lambda n: real[n]["latency_seconds"])
    ratio = real[name]["latency_seconds"] / plan.predicted["latency_seconds"]
    return [
        f"The fastest baseline is {name}: this plan has {ratio:.2f} times its speed, at a quality loss of "
        f"{plan.predicted['quality_loss']:.4g} against {real[name]['quality_loss']:.4g}."
    ]
