"""LLM-PQ's own heuristic, a baseline: adabits, then bit-width transfers from the slowest stage to faster ones.

A transfer swaps one layer of many bits on a faster stage for several layers of few bits on the slowest one, which move
over, so that memory stays about the same while the slowest stage has fewer layers. The first faster stage, beginning
with the fastest, for which a transfer lowers the objective gets the best one; it ends when there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner.adabits import adabits
from ds_llmpq.planner.objective import Prediction, evaluate, objective_value, rounds, violations
from ds_llmpq.planner.problem import MicroBatchCandidates, Problem

MOST_ORDERS = 24  # of device types; the devices of a type stay together


def llmpq_heuristic(problem: Problem) -> Iterator[Assignment]:
    """One assignment for each order of device types, at the micro-batches best for adabits in the listed order."""
    starts = {start: evaluate(problem, start).latency_seconds for start in adabits(problem)}
    if not starts:
        return
    best = min(starts, key=starts.__getitem__)
    sizes = MicroBatchCandidates((best.prefill_micro_batch,), (best.decode_micro_batch,))
    for ordered in _orders(replace(problem, micro_batches=sizes)):
        for start in adabits(ordered):
            yield _transfer_until_it_ends(problem, start)


def _orders(problem: Problem) -> Iterator[Problem]:
    """The listed order, then those of device types if the problem leaves the order free."""
    yield problem
    if problem.device_order == "free":
        types = dict.fromkeys(device.type for device in problem.devices)
        for order in itertools.islice(itertools.permutations(types), MOST_ORDERS):
            devices = sorted(problem.devices, key=lambda device, order=order: order.index(device.type))
            yield replace(problem, devices=tuple(devices))


def _transfer_until_it_ends(problem: Problem, best: Assignment) -> Assignment:
    value = objective_value(problem, evaluate(problem, best))
    while (step := _find_transfer(problem, best, value)) is not None:
        value, best = step
    return best


def _find_transfer(problem: Problem, start: Assignment, value: float) -> tuple[float, Assignment] | None:
    """(objective, assignment) after the best transfer to the fastest stage that has one."""
    *faster, slowest = _rank_stages(problem, start, evaluate(problem, start))
    for pioneer in faster:
        found = []
        for high, low in itertools.product(problem.bits, repeat=2):
            if high % low == 0:
                found += list(_least_lossy(problem, start, pioneer, slowest, (high, low)))
        rated = sorted(((objective_value(problem, evaluate(problem, a)), i) for i, a in enumerate(found)))
        for reached, i in rated:
            if reached >= value * (1 - 1e-12):
                break
            if not violations(problem, found[i]):
                return reached, found[i]
    return None


def _rank_stages(problem: Problem, start: Assignment, seen: Prediction) -> list[int]:
    """Stages by their work on the whole batch, links counted where they are slower; the slowest last."""
    m_p, m_d = rounds(problem, start.prefill_micro_batch, start.decode_micro_batch)
    steps = m_d * (problem.workload.generated_tokens - 1)
    prefill = map(max, seen.stage_prefill_seconds, seen.link_prefill_seconds)
    decode = map(max, seen.stage_decode_seconds, seen.link_decode_seconds)
    work = [m_p * p + steps * d for p, d in zip(prefill, decode, strict=True)]
    return sorted(range(len(work)), key=work.__getitem__)


def _least_lossy(
    problem: Problem, start: Assignment, pioneer: int, slowest: int, rule: tuple[int, int]
) -> Iterator[Assignment]:
    """The least lossy of the transfers by a rule (high, low): all take the same time. Of the layers that move, only
    neighbours among those of `low` bits are tried, where LLM-PQ tries every combination."""
    high, low = rule
    count = high // low
    if len(start.stages[slowest].bits) <= count:
        return
    bits = [width for stage in start.stages for width in stage.bits]
    given, taken = (
        [i for i in range(start.stages[j].first, start.stages[j].last) if bits[i] == width]
        for j, width in ((pioneer, high), (slowest, low))
    )
    column = {width: b for b, width in enumerate(problem.bits)}
    best = None
    for i, k in itertools.product(given, range(len(taken) - count + 1)):
        moved = taken[k : k + count]
        for kept in moved:
            parts = [[width] for width in bits]
            parts[i] = [low] * count
            for layer in moved:
                parts[layer] = [high] if layer == kept else []
            made = [width for part in parts for width in part]
            loss = sum(problem.sensitivity[layer][column[width]] for layer, width in enumerate(made))
            if best is None or loss < best[0]:
                best = loss, made
    if best is not None:
        for moved in {count - 1, count} - {0}:  # the paper's swap; its code also moves the boundary by one more layer
            yield _cut(start, best[1], pioneer, slowest, moved)


def _cut(start: Assignment, bits: list[int], pioneer: int, slowest: int, moved: int) -> Assignment:
    """The stages with `moved` layers fewer on the slowest and more on the pioneer; those between move along."""
    stages, first = [], 0
    for j, stage in enumerate(start.stages):
        last = first + stage.last - stage.first + moved * ((j == pioneer) - (j == slowest))
        stages.append(StageAssignment(stage.device, first, last, tuple(bits[first:last])))
        first = last
    return replace(start, stages=tuple(stages))
