"""From a solver's decisions to a plan, and from a solved plan to one that can be launched: hosts, ranks, threads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.hostfile import order_ranks
from ds_llmpq.cost.latency import LayerCosts
from ds_llmpq.errors import UserError
from ds_llmpq.plan import (
    Assignment,
    Deployment,
    LinkSeconds,
    MicroBatches,
    PassTimes,
    Plan,
    PlannedModel,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
)
from ds_llmpq.planner.objective import Prediction, link_seconds
from ds_llmpq.planner.problem import Problem
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.packing import count_bits_per_weight

if TYPE_CHECKING:
    from ds_llmpq.planner.build import Prepared


def compose_plan(problem: Problem, assignment: Assignment, prediction: Prediction, solver: SolverReport) -> Plan:
    """The plan of an evaluated assignment, without baselines and explanation."""
    devices = {device.name: device for device in problem.devices}
    stages = tuple(
        Stage(
            rank=rank,
            host=None,
            device=stage.device,
            device_type=devices[stage.device].type,
            layers=(stage.first, stage.last),
            bits=stage.bits,
            kernel=None,
            memory_bytes=StageMemory(**prediction.stage_memory_bytes[rank]),
            memory_budget_bytes=devices[stage.device].memory_bytes,
            prefill_seconds=prediction.stage_prefill_seconds[rank],
            decode_seconds=prediction.stage_decode_seconds[rank],
        )
        for rank, stage in enumerate(assignment.stages)
    )
    sizes = MicroBatches(assignment.prefill_micro_batch, assignment.decode_micro_batch)
    return Plan(None, problem.workload, stages, sizes, prediction.summary(), solver)


def _add_confidence(plan: Plan, prepared: Prepared) -> list[str]:
    """The sentence on what was quantized, with how sure its expected loss is."""
    loss = plan.predicted.quality_loss
    return [
        f"{text} {prepared.sensitivity.describe_confidence(loss)}" if loss else text for text in plan.explanation[:1]
    ]


def deploy(
    plan: Plan, cluster: Cluster, prepared: Prepared, model: PlannedModel, quant: QuantConfig, kernel: Kernel
) -> Plan:
    """A solved plan with what launching needs. Hosts are launched in the cluster's order, the user's own host first,
    so a stage's rank is its device's place in that order and not its place in the pipeline."""
    devices = [cluster.device(stage.device) for stage in plan.stages]
    kinds = sorted({device.type.kind for device in devices})
    if len(kinds) > 1:
        raise UserError(
            f"The plan mixes {' and '.join(kinds)} devices, which have no communicator in common; leave one kind "
            "out of the cluster."
        )
    order = {device.name: index for index, device in enumerate(cluster.devices)}
    where = [(device.host, device.slot) for device in devices]
    by_rank = sorted(where, key=lambda place: order[f"{place[0]}:{place[1]}"])
    ranks = dict(zip(by_rank, order_ranks(by_rank), strict=True))
    stages = tuple(
        replace(
            stage,
            rank=ranks[place],
            host=device.host,
            kernel=kernel.name,
            kind=device.type.kind,
            slot=device.slot,
            threads=device.threads,
            cpu_share=device.cpu_share,
            **_price_passes(plan, index, prepared.costs[device.type.name]),
        )
        for index, (stage, device, place) in enumerate(zip(plan.stages, devices, where, strict=True))
    )
    seconds = {
        phase: link_seconds(prepared.problem, plan.assignment().stages, phase, getattr(plan.micro_batch, phase))
        for phase in ("prefill", "decode")
    }
    deployment = Deployment(
        prepared.dtype,
        dict(cluster.env),
        LinkSeconds(**seconds),
        cluster.sum_prices(stage.device for stage in plan.stages),
    )
    return replace(
        plan,
        model=model,
        stages=stages,
        quant=Quantization.from_config(quant),
        deployment=deployment,
        quality_loss_interval=prepared.sensitivity.interval(plan.predicted.quality_loss),
        bits_per_weight=count_bits_per_weight(
            prepared.memory.shape,
            [width for stage in stages for width in stage.bits],
            prepared.memory.groups,
            quant.lm_head_bits,
        ),
        provenance=dict(prepared.provenance),
        explanation=(*_add_confidence(plan, prepared), *plan.explanation[1:], *prepared.notes),
    )


def _price_passes(plan: Plan, index: int, costs: LayerCosts) -> dict[str, Any]:
    """What a stage's passes of other sizes than the planned one take: fewer sequences, shorter prompts or contexts, and
    the few long prompts that fit into a micro-batch of many short ones."""
    stage, last = plan.stages[index], len(plan.stages) - 1
    bits = Counter(stage.bits)
    workload, sizes = plan.workload, plan.micro_batch
    context = workload.prompt_tokens + workload.generated_tokens
    shares = {phase: costs.alone_share(phase) if last == 0 else 1.0 for phase in ("prefill", "decode")}

    def price(phase: str, rows: int, tokens: int) -> float:
        """`tokens`: new ones in prefill, cached ones in decode."""
        new, layer = (tokens, costs.prefill_seconds) if phase == "prefill" else (1, costs.decode_seconds)
        over = costs.pass_overhead(phase, rows, new)
        seconds = sum(count * layer(width, rows, tokens) for width, count in bits.items())
        seconds += costs.embed_seconds(rows, new) + over.first if index == 0 else 0.0
        seconds += costs.head_seconds(rows) + over.last if index == last else 0.0
        seconds += over.middle if 0 < index < last else 0.0
        seconds += over.contention if last else 0.0
        return float(f"{shares[phase] * seconds:.4g}")

    def price_all(phase: str, rows: list[int], tokens: list[int]) -> PassTimes:
        return PassTimes(
            tuple(rows), tuple(tokens), tuple(tuple(price(phase, row, count) for count in tokens) for row in rows)
        )

    return {
        "prefill_times": price_all(
            "prefill", _powers_to(sizes.prefill), _powers_to(sizes.prefill * workload.prompt_tokens)
        ),
        "decode_times": price_all("decode", _powers_to(sizes.decode), [1, workload.prompt_tokens + 1, context + 1]),
        "first_pass_seconds": costs.first_pass_seconds(bits),
    }


def _powers_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]
