"""Joining the job that the launcher started: ranks checked against the plan, process groups, this rank's device."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from ds_llmpq.engine.channels import DataChannel
from ds_llmpq.errors import UserError
from ds_llmpq.planner.plan import Plan, PlanStage


@dataclass(frozen=True)
class Place:
    """This process in the job: its stage, its device, and the gloo group beside the accelerator's communicator."""

    rank: int
    stage_index: int
    stage: PlanStage
    stage_ranks: list[int]
    device: torch.device
    side_group: dist.ProcessGroup
    data: DataChannel

    @property
    def is_driver(self) -> bool:
        """Rank 0 reads the input and writes the output."""
        return self.rank == 0


def join(plan: Plan, timeout_seconds: float) -> Place:
    """Joins the process group; raises `UserError` where the launched ranks are not those of the plan."""
    rank, world_size = _launched()
    _check_ranks(plan, rank, world_size)
    stage_index = next(index for index, stage in enumerate(plan.stages) if stage.rank == rank)
    stage = plan.stages[stage_index]
    kind = stage_kind(plan, stage_index)
    os.environ["DS_ACCELERATOR"] = kind
    local_index = local_rank(plan, rank)
    # DeepSpeed takes LOCAL_RANK for the device's index; the launcher's is wrong where hosts have unequal slots
    os.environ["LOCAL_RANK"] = str(local_index)
    threads = plan.engine["stages"][stage_index].get("threads")
    if kind == "cpu" and threads:
        torch.set_num_threads(threads)
    choose_interface(os.environ.get("MASTER_ADDR", ""))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    _init_process_group(kind, timeout)
    side_group = dist.new_group(backend="gloo", timeout=timeout)
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", local_index)
    if kind == "cuda":
        torch.cuda.set_device(device)
    ranks = [stage.rank for stage in plan.stages]
    return Place(rank, stage_index, stage, ranks, device, side_group, DataChannel(side_group, rank, world_size))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def stage_kind(plan: Plan, stage_index: int) -> str:
    return plan.engine["stages"][stage_index]["kind"]


def local_rank(plan: Plan, rank: int) -> int:
    """Index of a rank among those of its host, in slot order: the launcher shows each host's used slots, renumbered."""
    hosts = {stage.rank: stage.host for stage in plan.stages}
    return sum(1 for other in hosts if hosts[other] == hosts[rank] and other < rank)


def choose_interface(master_address: str) -> None:
    """Has gloo and NCCL talk over the interface that leads to rank 0, unless the environment names another.

    Left alone, gloo takes the one that this host's own name resolves to, often loopback: other hosts then wait forever.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(master_address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: only asks for the route
            own = probe.getsockname()[0]
    except OSError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _launched() -> tuple[int, int]:
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "RANK and WORLD_SIZE are not set: serve runs under the deepspeed launcher; start it with `ds-llmpq run`, "
            "or as `deepspeed --hostfile FILE --module ds_llmpq.verbs.serve plan=...`."
        ) from None


def _check_ranks(plan: Plan, rank: int, world_size: int) -> None:
    if world_size != len(plan.stages):
        raise UserError(
            f"The plan has {len(plan.stages)} stages, but {world_size} ranks were started; use the hostfile (and the "
            "--include line) that `plan` wrote beside plan.json."
        )
    host = next(stage.host for stage in plan.stages if stage.rank == rank)
    planned = sum(1 for stage in plan.stages if stage.host == host)
    started = int(os.environ.get("LOCAL_SIZE", planned))
    if started != planned:
        raise UserError(
            f"The plan puts {planned} stages on host {host}, but {started} ranks were started on the host of rank "
            f"{rank}; use the hostfile that `plan` wrote beside plan.json."
        )


def _init_process_group(kind: str, timeout: datetime.timedelta) -> None:
    import deepspeed

    from ds_llmpq.engine.pipeline_engine import quiet_deepspeed

    quiet_deepspeed()
    # On CPU, DeepSpeed would compile a shared-memory all-reduce at this point (a minute, and a compiler needed); a
    # pipeline reduces nothing.
    deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed(dist_backend="gloo" if kind == "cpu" else "nccl", timeout=timeout, verbose=False)
