"""From a solver's decisions to a plan, and from a solved plan to one that can be launched: hosts, ranks, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.hostfile import order_ranks
from ds_llmpq.errors import UserError
from ds_llmpq.plan import (
    Assignment,
    Deployment,
    LinkSeconds,
    MicroBatches,
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
        )
        for stage, device, place in zip(plan.stages, devices, where, strict=True)
    )
    seconds = {
        phase: link_seconds(prepared.problem, plan.assignment().stages, phase, getattr(plan.micro_batch, phase))
        for phase in ("prefill", "decode")
    }
    deployment = Deployment(prepared.dtype, dict(cluster.env), LinkSeconds(**seconds))
    return replace(
        plan,
        model=model,
        stages=stages,
        quant=Quantization.from_config(quant),
        deployment=deployment,
        provenance=dict(prepared.provenance),
        explanation=(*plan.explanation, *prepared.notes),
    )
