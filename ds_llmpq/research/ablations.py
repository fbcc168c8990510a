"""Simplified planners for ablations: each lacks one idea, and the real formula gives the cost of every plan.

`phase_blind` plans for prefill alone, and then chooses the best decode micro-batch. `equal_micro_batches` plans for
both phases, but with one micro-batch size. `grouped` decides for groups of layers. None has a bound.

`objective=reference` minimizes the latency formula that LLM-PQ published, by small changes to the best plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import Assignment, Plan, StageAssignment
from ds_llmpq.planner.check import check_plan
from ds_llmpq.planner.feasibility import pairs
from ds_llmpq.planner.objective import evaluate, objective_value, rounds, violations
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.solve import solve

OBJECTIVES = ("pipeline", "reference")
VARIANTS = ("full", "phase_blind", "equal_micro_batches", "grouped")


def solve_ablation(
    problem: Problem, variant: str = "full", group_layers: int = 1, objective: str = "pipeline", **options: Any
) -> Plan:
    """The plan of a variant; `full` is `solve` itself, which documents `options`.

    UserError: an unknown variant or objective, or groups that do not divide the layers. InfeasibleError: no plan found.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"ablation.objective={objective!r}; use one of {', '.join(OBJECTIVES)}")
    if objective == "reference":
        if variant != "full":
            raise UserError(f"ablation.objective=reference needs ablation.variant=full, not {variant}")
        variant = objective
    if variant not in (*VARIANTS, objective):
        raise UserError(f"ablation.variant={variant!r}; use one of {', '.join(VARIANTS)}")
    if variant == "full":
        return solve(problem, **options)
    for name in ("pins", "baseline"):
        if options.pop(name, None):
            raise UserError(f"ablation.variant={variant} knows no planner.{name}; leave it out")
    started = time.monotonic()
    if variant == "phase_blind":
        assignment = _phase_blind(problem, options)
    elif variant == "equal_micro_batches":
        assignment = _equal_micro_batches(problem, options)
    elif variant == "grouped":
        assignment = _grouped(problem, group_layers, options)
    else:
        assignment = _reference(problem, started + options.get("time_limit_seconds", 60.0), options)
    plan = check_plan(problem, assignment)
    name = f"groups of {group_layers}" if variant == "grouped" else variant
    return replace(plan, solver=replace(plan.solver, name=name, seconds=time.monotonic() - started))


def _phase_blind(problem: Problem, options: Mapping[str, Any]) -> Assignment:
    """Chooses cuts, bit widths and prefill size as if nothing were decoded, then the best decode size."""
    blind = replace(problem, workload=replace(problem.workload, generated_tokens=1))
    found = solve(blind, **{**options, "baselines": False}).assignment()
    candidates = [replace(found, decode_micro_batch=size) for size in problem.micro_batches.decode]
    fitting = [assignment for assignment in candidates if not violations(problem, assignment)]
    if not fitting:
        raise InfeasibleError("The phase-blind plan fits at no decode micro-batch; loosen the limit of planner.mode.")
    return min(fitting, key=_value(problem))


def _equal_micro_batches(problem: Problem, options: Mapping[str, Any]) -> Assignment:
    sizes = sorted(set(problem.micro_batches.prefill) & set(problem.micro_batches.decode))
    share = options.get("time_limit_seconds", 60.0) / max(len(sizes), 1)
    best: Plan | None = None
    for size in sizes:
        pins = {"micro_batch": {"prefill": size, "decode": size}}
        try:
            plan = solve(problem, **{**options, "baselines": False, "pins": pins, "time_limit_seconds": share})
        except UserError:
            continue  # this size does not fit
        if best is None or plan.solver.objective < best.solver.objective:
            best = plan
    if best is None:
        raise InfeasibleError("No one micro-batch size serves both phases; give planner.micro_batches sizes in common.")
    return best.assignment()


def _grouped(problem: Problem, group: int, options: Mapping[str, Any]) -> Assignment:
    """Solves the problem of L / g grouped layers and gives each layer the bit width and device of its group."""
    found = solve(merge_layers(problem, group), **{**options, "baselines": False}).assignment()
    stages = tuple(
        StageAssignment(
            s.device, s.first * group, s.last * group, tuple(width for width in s.bits for _ in range(group))
        )
        for s in found.stages
    )
    return replace(found, stages=stages)


def merge_layers(problem: Problem, group: int) -> Problem:
    """Merges layers g*k .. g*k + g - 1: times and bytes are g-fold, quality losses are summed."""
    if group < 1 or problem.layers % group:
        raise UserError(f"ablation.group_layers={group} must divide the model's {problem.layers} layers")
    starts = range(0, problem.layers, group)

    def times(table: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
        return {width: {size: group * t for size, t in row.items()} for width, row in table.items()}

    types = {
        name: replace(
            entry,
            prefill_layer_seconds=times(entry.prefill_layer_seconds),
            decode_layer_seconds=times(entry.decode_layer_seconds),
        )
        for name, entry in problem.device_types.items()
    }
    memory = replace(
        problem.memory,
        layer_bytes={w: tuple(sum(v[i : i + group]) for i in starts) for w, v in problem.memory.layer_bytes.items()},
        kv_bytes_per_sequence_layer=group * problem.memory.kv_bytes_per_sequence_layer,
    )
    sensitivity = tuple(tuple(map(sum, zip(*problem.sensitivity[i : i + group], strict=True))) for i in starts)
    return replace(problem, layers=problem.layers // group, device_types=types, memory=memory, sensitivity=sensitivity)


def _reference(problem: Problem, deadline: float, options: Mapping[str, Any]) -> Assignment:
    """Hill climbing on LLM-PQ's published objective, from the best plan at its best micro-batches."""
    found = solve(problem, **{**options, "baselines": False}).assignment()

    def rate(assignment: Assignment) -> float:
        return evaluate_reference(problem, assignment)

    sized = [replace(found, prefill_micro_batch=eta, decode_micro_batch=xi) for eta, xi in pairs(problem)]
    start = min((assignment for assignment in sized if not violations(problem, assignment)), key=rate)
    return _improve(problem, start, rate, deadline)


def evaluate_reference(problem: Problem, assignment: Assignment) -> float:
    """The problem's objective with LLM-PQ's published latency, which counts no links, and for decoding one pass plus
    (m_d - 1)(n - 1) times the slowest stage."""
    seen, tokens = evaluate(problem, assignment), problem.workload.generated_tokens
    m_p, m_d = rounds(problem, assignment.prefill_micro_batch, assignment.decode_micro_batch)
    prefill, decode = seen.stage_prefill_seconds, seen.stage_decode_seconds
    seconds = sum(prefill) + (m_p - 1) * max(prefill) + sum(decode) + (m_d - 1) * (tokens - 1) * max(decode)
    return objective_value(problem, replace(seen, latency_seconds=seconds))


def _improve(problem: Problem, best: Assignment, rate: Callable[[Assignment], float], deadline: float) -> Assignment:
    """Makes the best allowed move as long as one helps."""
    value = rate(best)
    while time.monotonic() < deadline:
        better = [(v, i, a) for i, a in enumerate(_moves(problem, best)) if (v := rate(a)) < value]
        step = next((entry for entry in sorted(better) if not violations(problem, entry[2])), None)
        if step is None:
            break
        value, _, best = step
    return best


def _value(problem: Problem) -> Callable[[Assignment], float]:
    return lambda assignment: objective_value(problem, evaluate(problem, assignment))


def _moves(problem: Problem, assignment: Assignment) -> Iterator[Assignment]:
    """Gives a layer another bit width, or moves a boundary by one layer, which takes any bit width."""
    stages = assignment.stages
    for j, stage in enumerate(stages):
        for width in problem.bits:
            for i in _first_of_each_width(stage):
                if stage.bits[i] != width:
                    yield _with(assignment, {j: replace(stage, bits=(*stage.bits[:i], width, *stage.bits[i + 1 :]))})
    for j, (left, right) in enumerate(pairwise(stages)):
        for width in problem.bits:
            if len(right.bits) > 1:
                grown = replace(left, last=left.last + 1, bits=(*left.bits, width))
                yield _with(assignment, {j: grown, j + 1: replace(right, first=right.first + 1, bits=right.bits[1:])})
            if len(left.bits) > 1:
                grown = replace(right, first=right.first - 1, bits=(width, *right.bits))
                yield _with(assignment, {j: replace(left, last=left.last - 1, bits=left.bits[:-1]), j + 1: grown})


def _first_of_each_width(stage: StageAssignment) -> list[int]:
    """The layers of a stage differ little, so one of each bit width is tried."""
    return [stage.bits.index(width) for width in sorted(set(stage.bits))]


def _with(assignment: Assignment, changed: Mapping[int, StageAssignment]) -> Assignment:
    stages = tuple(changed.get(j, stage) for j, stage in enumerate(assignment.stages))
    return replace(assignment, stages=stages)
