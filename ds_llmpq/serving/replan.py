"""Plans on the devices that are left, as close as possible to the plan that lost some."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import Plan
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.serving.config import PlanningConfig
from ds_llmpq.serving.planning import Progress, make_plan


def plan_without(
    settings: PlanningConfig,
    plan: Plan,
    lost: list[str],
    out: Path,
    widths_free: bool,
    progress: Progress | None = None,
) -> Plan:
    """Plans for the same workload, or else for fewer sequences at once, with the plan's own HQQ settings. Layers keep
    their bit widths if possible, so that answers stay the same; `widths_free` allows other widths if it is not.

    `UserError`: the configured cluster is not the plan's, or what is left cannot hold the model.
    """
    cluster = settings.cluster
    known = {f"{host.name}:{device.slot}" for host in cluster.hosts for device in host.devices}
    if missing := [stage.device for stage in plan.stages if stage.device not in known]:
        raise UserError(
            f"run.on_loss=replan needs the cluster that the plan was made for, but {cluster.name} has no {missing[0]}; "
            "give cluster=NAME or cluster_file=FILE."
        )
    left = remove_devices(cluster, set(lost))
    if not left.hosts:
        raise UserError("No device of the cluster is left; mend one and run again.")
    widths = [width for stage in plan.stages for width in stage.bits]
    model = replace(settings.model, path=settings.model.path or plan.model_path)
    settings = replace(settings, model=model)
    pinned = {"bits": {str(layer): width for layer, width in enumerate(widths)}}
    quant = plan.quant.to_config() if plan.quant else settings.quant
    last: InfeasibleError | None = None
    sequences = plan.workload.sequences
    while sequences:
        pool = plan.workload.pool_positions * sequences // plan.workload.sequences
        workload = WorkloadConfig(**asdict(plan.workload) | {"sequences": sequences, "pool_positions": pool or None})
        for pins in [pinned, {}] if widths_free else [pinned]:
            planner = replace(settings.planner, mode="theta", pins=pins, baseline=None, deadline_seconds=None)
            asked = replace(settings, cluster=left, planner=planner, workload=workload, quant=quant)
            try:
                return make_plan(asked, out, progress)
            except InfeasibleError as error:
                last = error
        sequences //= 2
    raise last


def remove_devices(cluster: ClusterConfig, lost: set[str]) -> ClusterConfig:
    """The cluster without some devices (`host:slot`), their links, and hosts without any other."""
    hosts = []
    for host in cluster.hosts:
        devices = [device for device in host.devices if f"{host.name}:{device.slot}" not in lost]
        if devices:
            hosts.append(replace(host, devices=devices))
    pairs = [pair for pair in cluster.links.pairs if not {pair.source, pair.target} & lost]
    return replace(cluster, hosts=hosts, links=replace(cluster.links, pairs=pairs))
