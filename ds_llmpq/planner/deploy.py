"""From a solver's decisions to a plan, and from a solved plan to one that can be launched: hosts, ranks, threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.hostfile import include_string, launch_ranks
from ds_llmpq.errors import UserError
from ds_llmpq.plan import Assignment, Plan, SolverReport, Stage
from ds_llmpq.planner.objective import Prediction, link_seconds
from ds_llmpq.planner.problem import Problem
from ds_llmpq.quant.config import QuantConfig

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
            memory_bytes=prediction.stage_memory_bytes[rank],
            memory_budget_bytes=devices[stage.device].memory_bytes,
            prefill_seconds=prediction.stage_prefill_seconds[rank],
            decode_seconds=prediction.stage_decode_seconds[rank],
        )
        for rank, stage in enumerate(assignment.stages)
    )
    sizes = {"prefill": assignment.prefill_micro_batch, "decode": assignment.decode_micro_batch}
    return Plan(None, problem.workload, stages, sizes, prediction.summary(), solver)


def deploy(
    plan: Plan, cluster: Cluster, prepared: Prepared, model: Mapping[str, Any], quant: QuantConfig, kernel: str
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
    ranks = dict(zip(by_rank, launch_ranks(by_rank), strict=True))
    stages = tuple(
        replace(stage, rank=ranks[place], host=device.host, kernel=kernel)
        for stage, device, place in zip(plan.stages, devices, where, strict=True)
    )
    assignment, sizes = plan.assignment(), plan.micro_batch.items()
    engine = {
        "dtype": prepared.dtype,
        "stages": [
            {"kind": device.type.kind, "slot": device.slot, "threads": device.threads, "cpu_share": device.cpu_share}
            for device in devices
        ],
        "include": include_string(by_rank),
        "link_seconds": {
            phase: link_seconds(prepared.problem, assignment.stages, phase, size) for phase, size in sizes
        },
        "env": dict(cluster.env),
    }
    return replace(
        plan,
        model=dict(model),
        stages=stages,
        quant=asdict(quant),
        engine=engine,
        provenance=dict(prepared.provenance),
        explanation=(*plan.explanation, *prepared.notes),
    )
