"""What a plan costs and whether it is allowed: the contract of `problem.json`, written once.

    prefill = sum_j P_j + sum_j p_j + (m_p - 1) * max_j max(P_j, p_j)
    decode  = (n - 1) * max( m_d * max_j max(D_j, d_j),  sum_j D_j + sum_j d_j )
    latency = prefill + decode,   quality_loss = sum_i sensitivity[i, bits_i]

P_j and D_j of a plan with one stage are the alone share of what they would be beside others without contention.

Everything here is plain Python over the `Problem`: it shares no code with the solvers and is their judge.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Protocol

from ds_llmpq.plan import Assignment, PredictedTotals, StageAssignment
from ds_llmpq.planner.problem import Problem, ProblemDevice

# Decoded solver output may exceed a hard limit by rounding only.
RELATIVE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Prediction:
    """What an assignment costs. Per-stage tuples are in pipeline order; link j leads from stage j to stage j + 1,
    the last one back to the first stage. Times of an unavailable (bits, size) are infinite."""

    latency_seconds: float
    prefill_seconds: float
    decode_seconds: float
    throughput_tokens_per_second: float
    quality_loss: float
    stage_prefill_seconds: tuple[float, ...]
    stage_decode_seconds: tuple[float, ...]
    link_prefill_seconds: tuple[float, ...]
    link_decode_seconds: tuple[float, ...]
    stage_memory_bytes: tuple[dict[str, float], ...]

    @property
    def slowest_prefill_seconds(self) -> float:
        return max(*self.stage_prefill_seconds, *self.link_prefill_seconds)

    @property
    def slowest_decode_seconds(self) -> float:
        return max(*self.stage_decode_seconds, *self.link_decode_seconds)

    @property
    def ring_seconds(self) -> float:
        """One micro-batch's decode pass through all stages and links."""
        return sum(self.stage_decode_seconds) + sum(self.link_decode_seconds)

    def ring_binds(self, decode_rounds: int) -> bool:
        """A pass takes no less than the slowest resource needs for all micro-batches of a decode round."""
        return self.ring_seconds >= decode_rounds * self.slowest_decode_seconds

    def summary(self) -> PredictedTotals:
        """The five totals, as `plan.json` holds them."""
        return PredictedTotals(
            self.latency_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            self.throughput_tokens_per_second,
            self.quality_loss,
        )


def rounds(problem: Problem, prefill_micro_batch: int, decode_micro_batch: int) -> tuple[int, int]:
    """(m_p, m_d): micro-batches in a prefill, and in a decode round."""
    sequences = problem.workload.sequences
    return -(-sequences // prefill_micro_batch), -(-sequences // decode_micro_batch)


def stage_seconds(problem: Problem, stage: StageAssignment, phase: str, size: int) -> float:
    """P_j or D_j: one micro-batch through the stage's layers, plus embedding and head where it holds them. A stage with
    all layers is the plan's only one."""
    entry = problem.device_types[_device(problem, stage).type]
    table = getattr(entry, f"{phase}_layer_seconds")
    by_bits = {
        bits: table.get(bits, {}).get(size, math.inf) if bits in entry.bits else math.inf for bits in set(stage.bits)
    }
    seconds = [by_bits[bits] for bits in stage.bits]
    if stage.first == 0:
        seconds.append(getattr(entry, f"{phase}_embed_seconds").get(size, math.inf))
    if stage.last == problem.layers:
        seconds.append(getattr(entry, f"{phase}_head_seconds").get(size, math.inf))
    if not all(map(math.isfinite, seconds)):
        return math.inf
    if stage.last - stage.first < problem.layers:
        return math.fsum(seconds)
    return getattr(entry, f"{phase}_alone_share") * math.fsum([*seconds, -2 * entry.contention_seconds])


def link_seconds(problem: Problem, stages: tuple[StageAssignment, ...], phase: str, size: int) -> tuple[float, ...]:
    """p_j or d_j, j = 1..K: hidden states from stage to stage, then the tokens back to the first stage."""
    if len(stages) == 1:
        return (0.0,)
    links = problem.links
    tokens = problem.workload.prefill_tokens if phase == "prefill" else 1
    forward, back = size * tokens * links.hidden_bytes_per_token, size * links.token_bytes
    ring = [*stages, stages[0]]
    seconds = []
    for j, (sender, receiver) in enumerate(itertools.pairwise(ring)):
        link = links.between(sender.device, receiver.device)
        seconds.append(link.latency_seconds + (back if j == len(stages) - 1 else forward) * link.seconds_per_byte)
    return tuple(seconds)


def stage_memory(problem: Problem, assignment: Assignment, stage: StageAssignment) -> dict[str, float]:
    """Bytes by part: weights, kv, embed, head, workspace."""
    memory = problem.memory
    layers = range(stage.first, stage.last)
    first, last = stage.first == 0, stage.last == problem.layers
    return {
        "weights": sum(memory.layer_bytes[b][i] for i, b in zip(layers, stage.bits, strict=True)),
        # whole bytes again, where sequences share out those of a common prefix
        "kv": round(memory.kv_bytes_per_sequence_layer * problem.workload.sequences * len(layers), 3),
        "embed": memory.embed_bytes if first else 0,
        "head": charge_head(memory, first, last),
        "workspace": max(
            memory.workspace_bytes.prefill[assignment.prefill_micro_batch],
            memory.workspace_bytes.decode[assignment.decode_micro_batch],
        ),
    }


class HeadBytes(Protocol):
    head_bytes: float
    tied_head: bool
    tied_bytes: float | None


def charge_head(held: HeadBytes, first: bool, last: bool) -> float:
    """Bytes of the head on a stage that holds the first or last layer: it stands behind the last layer, and a tied
    lm_head, but not the norm before it, is the embedding itself where one stage holds both ends."""
    if not last:
        return 0
    if not (first and held.tied_head):
        return held.head_bytes
    return 0 if held.tied_bytes is None else held.head_bytes - held.tied_bytes


def evaluate(problem: Problem, assignment: Assignment) -> Prediction:
    """Predicted times, throughput and quality loss of a structurally valid assignment (see `violations`)."""
    stages, eta, xi = assignment.stages, assignment.prefill_micro_batch, assignment.decode_micro_batch
    blank = Prediction(
        *(0.0,) * 4,
        quality_loss=quality_loss(problem, assignment),
        stage_prefill_seconds=tuple(stage_seconds(problem, stage, "prefill", eta) for stage in stages),
        stage_decode_seconds=tuple(stage_seconds(problem, stage, "decode", xi) for stage in stages),
        link_prefill_seconds=link_seconds(problem, stages, "prefill", eta),
        link_decode_seconds=link_seconds(problem, stages, "decode", xi),
        stage_memory_bytes=tuple(stage_memory(problem, assignment, stage) for stage in stages),
    )
    return with_totals(problem, assignment, blank)


def with_totals(problem: Problem, assignment: Assignment, seen: Prediction) -> Prediction:
    """With the totals that follow from the times of its stages and links: the formula."""
    m_p, m_d = rounds(problem, assignment.prefill_micro_batch, assignment.decode_micro_batch)
    tokens = problem.workload.generated_tokens
    prefill = sum(seen.stage_prefill_seconds) + sum(seen.link_prefill_seconds)
    prefill += (m_p - 1) * seen.slowest_prefill_seconds
    # each decode round is bound by the slowest resource or by one micro-batch's trip around the ring
    decode = (tokens - 1) * max(m_d * seen.slowest_decode_seconds, seen.ring_seconds) if tokens > 1 else 0.0
    if not all(map(math.isfinite, (*seen.stage_prefill_seconds, *seen.stage_decode_seconds))):
        prefill = decode = math.inf
    latency = prefill + decode
    speed = problem.workload.sequences * tokens / latency if latency > 0 else math.inf
    return replace(
        seen,
        latency_seconds=latency,
        prefill_seconds=prefill,
        decode_seconds=decode,
        throughput_tokens_per_second=speed,
    )


def quality_loss(problem: Problem, assignment: Assignment) -> float:
    """sum_i sensitivity[i, bits_i]."""
    column = {bits: j for j, bits in enumerate(problem.bits)}
    return math.fsum(
        problem.sensitivity[i][column[bits]]
        for stage in assignment.stages
        for i, bits in zip(range(stage.first, stage.last), stage.bits, strict=True)
    )


def objective_value(problem: Problem, prediction: Prediction) -> float:
    """What the problem's mode minimises."""
    mode = problem.objective.mode
    if mode == "max_latency":
        return prediction.quality_loss
    return prediction.latency_seconds + problem.objective.theta * prediction.quality_loss


def tie_value(problem: Problem, prediction: Prediction) -> float:
    """What decides between plans of equal objective: the faster, or the better, plan."""
    return prediction.quality_loss if problem.objective.mode == "max_quality_loss" else prediction.latency_seconds


def find_time_error(problem: Problem, assignment: Assignment) -> float | None:
    """How far off the predicted latency is on average, as a share of it: that of each phase's times, on the device type
    that is known worst. None where that of a type in use is not known."""
    types, seen, off = {_device(problem, stage).type for stage in assignment.stages}, evaluate(problem, assignment), 0.0
    for phase in ("prefill", "decode"):
        errors = [getattr(problem.device_types[name], f"{phase}_error") for name in types]
        if None in errors:
            return None
        off += max(errors) * getattr(seen, f"{phase}_seconds")
    return off / seen.latency_seconds if seen.latency_seconds > 0 else None


def violations(problem: Problem, assignment: Assignment) -> list[str]:
    """Every rule the assignment breaks, one sentence each; empty means feasible. Independent of all solvers."""
    found = _structure(problem, assignment)
    if found:
        return found
    found += _availability(problem, assignment) + _memory(problem, assignment)
    return found or _limits(problem, evaluate(problem, assignment))


def _structure(problem: Problem, assignment: Assignment) -> list[str]:
    """Contiguity, device use, order, candidate sizes and widths."""
    found = []
    for phase in ("prefill", "decode"):
        size, known = getattr(assignment, f"{phase}_micro_batch"), getattr(problem.micro_batches, phase)
        if size not in known:
            found.append(f"The {phase} micro-batch is {size}, but the candidates are {', '.join(map(str, known))}.")
    order = {device.name: i for i, device in enumerate(problem.devices)}
    expected, used = 0, []
    for j, stage in enumerate(assignment.stages):
        if stage.device not in order:
            found.append(f"Stage {j} is on {stage.device!r}, which is no device of the problem.")
        if stage.device in used:
            found.append(f"Stage {j} is on {stage.device!r}, which an earlier stage already uses.")
        if stage.first != expected or stage.last <= stage.first:
            found.append(
                f"Stage {j} holds layers [{stage.first}, {stage.last}), but must begin at {expected} and not be empty."
            )
        if len(stage.bits) != stage.last - stage.first or not {*stage.bits} <= {*problem.bits}:
            found.append(f"Stage {j} must give one of the bit widths {problem.bits} for each of its layers.")
        expected = stage.last
        used.append(stage.device)
    if expected != problem.layers:
        found.append(f"The stages end at layer {expected}, but the model has {problem.layers} layers.")
    positions = [order.get(name, -1) for name in used]
    if problem.device_order == "fixed" and positions != sorted(positions):
        found.append("The stages do not follow the fixed device order.")
    return found


def _availability(problem: Problem, assignment: Assignment) -> list[str]:
    found = []
    for j, stage in enumerate(assignment.stages):
        for phase in ("prefill", "decode"):
            size = getattr(assignment, f"{phase}_micro_batch")
            if math.isinf(stage_seconds(problem, stage, phase, size)):
                kind = _device(problem, stage).type
                found.append(f"Stage {j} needs {phase} times at size {size} that the type {kind!r} does not offer.")
    return found


def _memory(problem: Problem, assignment: Assignment) -> list[str]:
    found = []
    for j, stage in enumerate(assignment.stages):
        need, budget = sum(stage_memory(problem, assignment, stage).values()), _device(problem, stage).memory_bytes
        if need > budget:
            found.append(
                f"Stage {j} needs {need:,.0f} bytes on {stage.device!r}, "
                f"{need - budget:,.0f} more than its {budget:,.0f}."
            )
    return found


def _limits(problem: Problem, prediction: Prediction) -> list[str]:
    mode, limit = problem.objective.mode, problem.objective.limit
    slack = limit * (1 + RELATIVE_TOLERANCE)
    if mode == "max_quality_loss" and prediction.quality_loss > slack:
        return [f"The quality loss is {prediction.quality_loss:.6g}, above the limit {limit:.6g}."]
    if mode == "max_latency" and prediction.latency_seconds > slack:
        return [f"The latency is {prediction.latency_seconds:.6g} s, above the limit {limit:.6g} s."]
    return []


def _device(problem: Problem, stage: StageAssignment) -> ProblemDevice:
    return problem.by_name[stage.device]
