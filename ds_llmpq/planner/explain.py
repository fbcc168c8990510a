"""Why this plan: what was quantized, the bottleneck and what limits it, what more memory would be worth."""

import math
from dataclasses import replace

import numpy as np

from ds_llmpq.plan import ESTIMATES, Assignment, Plan, Stage
from ds_llmpq.planner.arrays import PairArrays, pair_arrays
from ds_llmpq.planner.objective import Prediction, evaluate, find_time_error, objective_value
from ds_llmpq.planner.problem import Problem
from ds_llmpq.planner.unquantized import leave_unquantized
from ds_llmpq.quant.packing import UNQUANTIZED_BITS
from ds_llmpq.wording import format_number, format_size, pluralize

GIGABYTE = 1e9


def explain_plan(problem: Problem, plan: Plan, rival: Assignment | None = None) -> list[str]:
    """Sentences about the plan, the most important first. `rival`: the unquantized plan that a quantized one was
    preferred to, or the quantized one that was not sure enough to be faster."""
    assignment = plan.assignment()
    prediction = evaluate(problem, assignment)
    sentences = [_quantization(problem, plan, rival), _balance(problem, assignment, prediction)]
    sentences += [_bottleneck(problem, plan, prediction, phase) for phase in ("prefill", "decode")]
    sentences += _slow_low_bits(problem, plan)
    sentences += _left_out(problem, plan)
    sentences += _memory_worth(problem, plan, prediction)
    sentences += _against_baselines(problem, plan)
    return sentences


def _quantization(problem: Problem, plan: Plan, rival: Assignment | None) -> str:
    """What is below 16 bits, and whether memory asked for it; or how sure it is that this would be faster."""
    assignment = plan.assignment()
    if not (counts := _count_quantized(assignment)):
        if rival is not None and (others := _count_quantized(rival)):
            return (
                f"Not quantized: a plan with {others} would be "
                f"{_compare_times(problem, rival, assignment)}; "
                "planner.calibrate=always times again, planner.least_gain=0 quantizes all the same."
            )
        return f"Nothing is quantized: all {pluralize(problem.layers, 'layer')} stay at {UNQUANTIZED_BITS} bits."
    loss, objective = plan.predicted.quality_loss, problem.objective
    allowed = ""
    if objective.mode == "max_quality_loss":
        limit = format_number(objective.limit)
        allowed = f" of the {limit} allowed" if loss <= objective.limit else f", more than the {limit} that are allowed"
    return (
        f"Quantized: {counts}, because {_why_quantized(problem, plan, rival)}; "
        f"expected to cost {_format_small(loss, 1e-4)} nats a token{allowed}, "
        f"{_format_small(100 * math.expm1(loss), 0.01)} % in perplexity."
    )


def _format_small(value: float, least: float) -> str:
    return f"under {least:g}" if 0 < value < least else format_number(value)


def _count_quantized(assignment: Assignment) -> str:
    """Nothing where no layer is."""
    bits = [width for stage in assignment.stages for width in stage.bits]
    low = [width for width in bits if width < UNQUANTIZED_BITS]
    counts = ", ".join(f"{low.count(width)} at {width} bits" for width in sorted(set(low)))
    return f"{len(low)} of {pluralize(len(bits), 'layer')} ({counts})" if low else ""


def _why_quantized(problem: Problem, plan: Plan, rival: Assignment | None) -> str:
    if UNQUANTIZED_BITS not in problem.bits:
        return f"{UNQUANTIZED_BITS} bits are not among the choices"
    if leave_unquantized(problem) is None:
        return "they do not fit the devices' memory otherwise"
    if plan.solver.status in ("baseline", "checked"):
        return "that plan was asked for"
    return "that is faster" if rival is None else f"that is {_compare_times(problem, plan.assignment(), rival)}"


def _compare_times(problem: Problem, quantized: Assignment, whole: Assignment) -> str:
    seconds, without = (evaluate(problem, each).latency_seconds for each in (quantized, whole))
    gain, off = format_number(100 * (without / seconds - 1), 2), find_time_error(problem, quantized)
    sure = "whose error is not known" if off is None else f"that are off by {format_number(100 * off, 2)} % (measured)"
    return f"{gain} % faster, by times {sure}"


def _balance(problem: Problem, assignment: Assignment, seen: Prediction) -> str:
    share = 100 * seen.decode_seconds / seen.latency_seconds if seen.latency_seconds > 0 else 0.0
    ring = seen.ring_seconds
    groups = -(-problem.workload.sequences // assignment.decode_micro_batch)
    slowest = groups * seen.slowest_decode_seconds
    bound = "the slowest stage working through all micro-batches" if slowest >= ring else "one trip around the ring"
    return (
        f"Decoding takes {share:.0f} % of {format_number(seen.latency_seconds, 4)} s; a decode round of "
        f"{format_number(max(ring, slowest), 4)} s is bound by {bound} ({pluralize(groups, 'micro-batch')} of "
        f"{assignment.decode_micro_batch})."
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
            f"The {phase} bottleneck is the link from {plan.stages[k].device} to {after} with "
            f"{format_number(links[k], 4)} s a micro-batch, more than any stage: the network limits it."
        )
    stage = plan.stages[j]
    return (
        f"The {phase} bottleneck is stage {j} on {stage.device} with {format_number(stages[j], 4)} s a micro-batch "
        f"({pluralize(len(stage.bits), 'layer')}, {_widths(stage)}); {_limit(problem, plan, stage, phase)}."
    )


def _widths(stage: Stage) -> str:
    counts = {bits: stage.bits.count(bits) for bits in sorted(set(stage.bits))}
    return ", ".join(f"{count} x {bits} bits" for bits, count in counts.items())


def _limit(problem: Problem, plan: Plan, stage: Stage, phase: str) -> str:
    """Memory, if a faster bit width of this stage or one layer more elsewhere does not fit; else compute."""
    kind = problem.device_types[stage.device_type]
    size = getattr(plan.micro_batch, phase)
    times = {b: getattr(kind, f"{phase}_layer_seconds").get(b, {}).get(size) for b in kind.bits}
    usable = {b: seconds for b, seconds in times.items() if seconds is not None}
    fastest = min(usable, key=lambda b: usable[b])
    most_bytes = {b: max(problem.memory.layer_bytes[b]) for b in usable}
    slower = [b for b in stage.bits if usable[b] > usable[fastest]]
    free = stage.memory_budget_bytes - stage.memory_bytes.total
    if slower and most_bytes[fastest] - most_bytes[slower[0]] > free:
        return f"memory limits it: {fastest} bits would be faster, but only {format_size(free)} are free"
    lightest = min(most_bytes.values()) + problem.memory.kv_bytes_per_sequence_layer * problem.workload.sequences
    others = [s for s in plan.stages if s is not stage]
    spare = [s for s in others if s.memory_budget_bytes - s.memory_bytes.total >= lightest]
    if others and not spare:
        return "memory limits it: no other stage has room for one of its layers"
    return "compute and memory bandwidth limit it"


def _slow_low_bits(problem: Problem, plan: Plan) -> list[str]:
    """Where layers below 16 bits decode no faster than they would at 16."""
    size, ratios = plan.micro_batch.decode, {}
    for stage in plan.stages:
        times = problem.device_types[stage.device_type].decode_layer_seconds
        whole = times.get(UNQUANTIZED_BITS, {}).get(size)
        for bits in sorted(set(stage.bits) - {UNQUANTIZED_BITS}):
            if whole and times[bits][size] >= whole:
                ratio = f"{times[bits][size] / whole:.2f}"
                ratios[f"{bits} bits take {ratio} times as long as 16 on {stage.device_type}"] = None
    if not ratios:
        return []
    return [f"At decode micro-batches of {size} low bits save memory, but no time: {', '.join(ratios)}."]


def _left_out(problem: Problem, plan: Plan) -> list[str]:
    used = {stage.device for stage in plan.stages}
    idle = [device.name for device in problem.devices if device.name not in used]
    if not idle:
        return []
    names = ", ".join(idle[:6]) + (f" and {len(idle) - 6} more" if len(idle) > 6 else "")
    verb = "is" if len(idle) == 1 else "are"
    return [f"{len(idle)} of {len(problem.devices)} devices {verb} left out: {names}."]


def _memory_worth(problem: Problem, plan: Plan, seen: Prediction) -> list[str]:
    """What one GB more on one device would gain at least: the same stages, its bit widths chosen anew. No extrapolated
    price, which promises more than there is to gain where a GB is much for the model."""
    if problem.objective.mode == "max_latency":
        return []
    arrays = pair_arrays(problem, plan.micro_batch.prefill, plan.micro_batch.decode)
    found = []
    for j, stage in enumerate(plan.stages):
        before, after = (
            _value_with(problem, plan, j, _widths_within(problem, arrays, plan, seen, j, more))
            for more in (0.0, GIGABYTE)
        )
        if before - after > 1e-6 * abs(before):
            found.append((before - after, stage.device))
    if not found:
        return []
    found.sort(reverse=True)
    listed = ", or ".join(f"{format_number(gain)} s on {device}" for gain, device in found[:4])
    return [
        f"One GB more memory on one device would lower the objective of {format_number(plan.solver.objective, 4)} s, "
        f"with the same stages and other bit widths, by at least {listed}."
    ]


def _widths_within(
    problem: Problem, arrays: PairArrays, plan: Plan, seen: Prediction, j: int, more: float
) -> tuple[int, ...]:
    """Widths of stage j with so many bytes more, no slower than the slowest stages: the best exchange of one layer's
    bit width after the other."""
    stage = plan.stages[j]
    d = next(i for i, device in enumerate(problem.devices) if device.name == stage.device)
    passes = (arrays.generated_tokens - 1.0) * seen.ring_binds(arrays.decode_rounds)
    rows, column = np.arange(len(stage.bits)), {bits: b for b, bits in enumerate(problem.bits)}
    usable = arrays.available[d]
    times = [np.where(usable, table[d], np.inf) for table in (arrays.prefill, arrays.decode)]
    size, sensitivity = (table[slice(*stage.layers)] for table in (arrays.layer_bytes, arrays.sensitivity))
    cost = times[0] + (passes * times[1] if passes else 0.0) + problem.objective.theta * sensitivity  # [k, B]
    now = np.array([column[bits] for bits in stage.bits])
    room = [
        max(seen.stage_prefill_seconds) - seen.stage_prefill_seconds[j],
        max(seen.stage_decode_seconds) - seen.stage_decode_seconds[j],
        stage.memory_budget_bytes + more - stage.memory_bytes.total,
        problem.objective.limit - seen.quality_loss if problem.objective.mode == "max_quality_loss" else np.inf,
    ]
    for _ in range(2 * len(rows) * len(problem.bits)):
        by_bits = [times[0] - times[0][now][:, None], times[1] - times[1][now][:, None]]
        rises = [*by_bits, *(table - table[rows, now][:, None] for table in (size, sensitivity))]
        fits = np.logical_and.reduce([rise <= most for rise, most in zip(rises, room, strict=True)])
        gain = np.where(fits, cost[rows, now][:, None] - cost, 0.0)
        i, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, b] <= 1e-9 * abs(cost[i, now[i]]):
            break
        room = [most - rise[i, b] for rise, most in zip(rises, room, strict=True)]
        now[i] = b
    return tuple(problem.bits[b] for b in now)


def _value_with(problem: Problem, plan: Plan, j: int, bits: tuple[int, ...]) -> float:
    assignment = plan.assignment()
    stages = tuple(replace(s, bits=bits) if i == j else s for i, s in enumerate(assignment.stages))
    return objective_value(problem, evaluate(problem, replace(assignment, stages=stages)))


def _against_baselines(problem: Problem, plan: Plan) -> list[str]:
    """Speed-ups over an even split and over the fastest baseline that is a real plan, with the quality losses."""
    real = {
        name: entry
        for name, entry in plan.baselines.items()
        if not isinstance(entry, str) and name not in ESTIMATES and entry.latency_seconds > 0
    }
    if len(problem.devices) < 2 or not real or plan.predicted.latency_seconds <= 0:
        return []
    found = []
    if "uniform" not in real:
        found.append("equal numbers of layers at one bit width (uniform) do not fit")
    fastest = min(real, key=lambda name: real[name].latency_seconds)
    for name in dict.fromkeys(("uniform", fastest)):
        if (entry := real.get(name)) is not None:
            what = "equal numbers of layers at one bit width" if name == "uniform" else "the fastest baseline"
            ratio = entry.latency_seconds / plan.predicted.latency_seconds
            found.append(
                f"{ratio:.2f} times the speed of {what} ({name}, loss {_format_small(entry.quality_loss, 1e-4)})"
            )
    loss = _format_small(plan.predicted.quality_loss, 1e-4)
    return [f"Gain of planning, predicted: {'; '.join(found)}, at a loss of {loss} nats a token."]
