"""Joining the job that the launcher started: ranks checked against the plan, process groups, this rank's device."""

from __future__ import annotations

import datetime
import itertools
import socket
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from ds_llmpq.engine.channels import DataChannel
from ds_llmpq.launch import rendezvous
from ds_llmpq.launch.environment import (
    choose_accelerator,
    find_local_rank,
    prefer_interface,
    read_meeting_place,
    read_rank,
)
from ds_llmpq.plan import Plan, Stage


@dataclass(frozen=True)
class RankContext:
    """This process in the job: its stage, its device, and the gloo group beside the accelerator's communicator."""

    rank: int
    stage_index: int
    stage: Stage
    stage_ranks: list[int]
    device: torch.device
    side_group: dist.ProcessGroup
    data: DataChannel
    # process groups to the previous and to the next stage; None: the default one
    links: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)

    @property
    def is_driver(self) -> bool:
        """Rank 0 reads the input and writes the output."""
        return self.rank == 0


def init_rank(plan: Plan, timeout_seconds: float) -> RankContext:
    """Joins the process group; raises `UserError` where the launched ranks are not those of the plan."""
    rank = read_rank(plan)
    stage_index = next(index for index, stage in enumerate(plan.stages) if stage.rank == rank)
    stage = plan.stages[stage_index]
    local_index = find_local_rank(plan, rank)
    choose_accelerator(stage.kind, local_index)
    if stage.kind == "cpu" and stage.threads:
        torch.set_num_threads(stage.threads)
    choose_interface(read_meeting_place()[0])
    timeout = datetime.timedelta(seconds=timeout_seconds)
    device = torch.device("cpu") if stage.kind == "cpu" else torch.device("cuda", local_index)
    if stage.kind == "cuda":
        torch.cuda.set_device(device)  # first of all, or something takes memory on the host's first device
    _init_process_group(stage.kind, timeout)
    side_group = dist.new_group(backend="gloo", timeout=timeout)
    ranks = [stage.rank for stage in plan.stages]
    data = DataChannel(side_group, rank, len(plan.stages))
    links = _open_links(ranks, stage_index, timeout) if stage.kind == "cuda" else (None, None)
    return RankContext(rank, stage_index, stage, ranks, device, side_group, data, links)


def _open_links(
    ranks: list[int], stage_index: int, timeout: datetime.timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """A communicator for each pair of neighbours. In a common one nccl may run a rank's transfers one after another, so
    that a send waits for the receive that was asked for before it. gloo needs none, and each of its groups has
    threads. `timeout`: a group does not take the default group's; nccl's own is ten minutes."""
    groups = [dist.new_group([first, second], timeout=timeout) for first, second in itertools.pairwise(ranks)]
    ends = [None, *groups, None]
    return ends[stage_index], ends[stage_index + 1]


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
            prefer_interface(name)


def _init_process_group(kind: str, timeout: datetime.timedelta) -> None:
    import deepspeed

    from ds_llmpq.engine.pipeline_engine import quiet_deepspeed

    quiet_deepspeed()
    # On CPU, DeepSpeed would compile a shared-memory all-reduce at this point (a minute, and a compiler needed); a
    # pipeline reduces nothing.
    compatible = deepspeed.ops.__compatible_ops__
    compatible.update(dict.fromkeys(compatible, False))
    backend = "gloo" if kind == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False, init_method=rendezvous.register())
