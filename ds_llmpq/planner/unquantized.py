"""16 bits wherever quantizing gains too little: the search ends within its gap and does not care."""

from collections.abc import Callable
from dataclasses import replace

from ds_llmpq.plan import Assignment
from ds_llmpq.planner.feasibility import memory_feasible
from ds_llmpq.planner.objective import evaluate, violations
from ds_llmpq.planner.problem import Problem
from ds_llmpq.quant.packing import UNQUANTIZED_BITS


def leave_unquantized(problem: Problem) -> Problem | None:
    """The problem with 16 bits alone; None where that is no choice, the only one, or does not fit."""
    if UNQUANTIZED_BITS not in problem.bits or len(problem.bits) == 1:
        return None
    column = problem.bits.index(UNQUANTIZED_BITS)
    types = {
        name: replace(entry, bits=tuple(width for width in entry.bits if width == UNQUANTIZED_BITS))
        for name, entry in problem.device_types.items()
    }
    sensitivity = tuple((row[column],) for row in problem.sensitivity)
    whole = replace(problem, bits=(UNQUANTIZED_BITS,), device_types=types, sensitivity=sensitivity)
    return whole if memory_feasible(whole) else None


def raise_bits(
    problem: Problem, assignment: Assignment, accepts: Callable[[Assignment], bool], most_seconds: float
) -> Assignment:
    """The plan with layer after layer, those that lose most first, at the most bits with which it takes no longer than
    `most_seconds`."""
    column = {bits: j for j, bits in enumerate(problem.bits)}
    widths = [bits for stage in assignment.stages for bits in stage.bits]
    losses = [row[column[bits]] for row, bits in zip(problem.sensitivity, widths, strict=True)]
    for layer in sorted(range(problem.layers), key=lambda i: -losses[i]):
        for bits in sorted(problem.bits, reverse=True):
            if bits <= widths[layer]:
                break
            raised = _with_bits(assignment, layer, bits)
            if violations(problem, raised) or not accepts(raised):
                continue
            if evaluate(problem, raised).latency_seconds <= most_seconds:
                assignment = raised
                break
    return assignment


def _with_bits(assignment: Assignment, layer: int, bits: int) -> Assignment:
    stages = tuple(
        replace(stage, bits=tuple(bits if stage.first + i == layer else old for i, old in enumerate(stage.bits)))
        for stage in assignment.stages
    )
    return replace(assignment, stages=stages)
