"""Which of the plan's ranks this process is, as the launcher's environment says. Imports no torch."""

from __future__ import annotations

import os

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Plan


def read_rank(plan: Plan) -> int:
    """This process's rank. `UserError` where what was launched is not what was planned."""
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "RANK and WORLD_SIZE are not set: serve runs under the deepspeed launcher; start it with `ds-llmpq run`, "
            "or as `deepspeed --hostfile FILE --module ds_llmpq.commands.serve plan=...`."
        ) from None
    if world_size != len(plan.stages):
        raise UserError(
            f"The plan has {len(plan.stages)} stages, but {world_size} ranks were started; use the hostfile (and the "
            "--include line) that `plan` wrote beside plan.json."
        )
    ranks = sorted(stage.rank for stage in plan.stages)
    if ranks != list(range(world_size)):
        raise UserError(f"The plan's stages have ranks {ranks} instead of each from 0 to {world_size - 1}; plan again.")
    host = next(stage.host for stage in plan.stages if stage.rank == rank)
    planned = sum(1 for stage in plan.stages if stage.host == host)
    started = int(os.environ.get("LOCAL_SIZE", planned))
    if started != planned:
        raise UserError(
            f"The plan puts {planned} stages on host {host}, but {started} ranks were started on the host of rank "
            f"{rank}; use the hostfile that `plan` wrote beside plan.json."
        )
    return rank


def find_local_rank(plan: Plan, rank: int) -> int:
    """Index of a rank among those of its host, in slot order: the launcher shows each host's used slots, renumbered."""
    hosts = {stage.rank: stage.host for stage in plan.stages}
    return sum(1 for other in hosts if hosts[other] == hosts[rank] and other < rank)
