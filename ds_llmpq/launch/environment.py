"""Environment variables of the ranks: which ones files may set, which ones the launcher sets, and which ones must be
set before a library is imported. Imports no torch.

A variable can name a library to load (LD_PRELOAD, NCCL_NET_PLUGIN, OMP_TOOL_LIBRARIES), a program, a place to import
from, or a file to write (NCCL_DEBUG_FILE). So plans and cluster files may set only those listed here; the user may set
any on the command line as `cluster.env`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ds_llmpq.errors import UserError, quote
from ds_llmpq.plan import Plan
from ds_llmpq.wording import pluralize

RUN_MARK = "DS_LLMPQ_RUN"  # marks the processes of a run

_PLAIN = """
    MASTER_ADDR GLOO_SOCKET_IFNAME CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES
    OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES OMP_WAIT_POLICY OMP_DYNAMIC GOMP_SPINCOUNT GOMP_CPU_AFFINITY KMP_AFFINITY
    KMP_BLOCKTIME MKL_NUM_THREADS OPENBLAS_NUM_THREADS TOKENIZERS_PARALLELISM HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT
"""
_NCCL = """
    SOCKET_IFNAME SOCKET_FAMILY SOCKET_NTHREADS NSOCKS_PERTHREAD IB_DISABLE IB_HCA IB_GID_INDEX IB_TC IB_SL IB_TIMEOUT
    IB_RETRY_CNT IB_QPS_PER_CONNECTION IB_CUDA_SUPPORT NET_GDR_LEVEL NET_GDR_READ P2P_DISABLE P2P_LEVEL SHM_DISABLE
    NVLS_ENABLE CUMEM_ENABLE CROSS_NIC ALGO PROTO BUFFSIZE NTHREADS MIN_NCHANNELS MAX_NCHANNELS LAUNCH_MODE DEBUG
    DEBUG_SUBSYS
"""
FROM_FILES = frozenset([*_PLAIN.split(), *(f"NCCL_{name}" for name in _NCCL.split())])


def check_environment(env: Mapping[str, str], asked: Mapping[str, str], where: str) -> None:
    """`UserError` if the file `where` sets a variable that is not in `FROM_FILES`, unless the user's own cluster.env,
    `asked`, sets it to the same value."""
    for name, value in env.items():
        if name not in FROM_FILES and asked.get(name) != value:
            raise UserError(
                f"{where} sets the environment variable {quote(name)} to {quote(value)} for every rank, which a file "
                "may not; remove it there, or ask for it yourself on the command line with "
                f"'+cluster.env.{quote(name)[1:-1]}=VALUE' and that value."
            )


def read_place() -> tuple[int, int]:
    """This process's rank and the number of ranks. `KeyError` or `ValueError`: no launcher has set them."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def read_meeting_place() -> tuple[str, int]:
    """Address and port of rank 0."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def read_mark() -> str:
    """The mark of the run; empty if the ranks were started by hand."""
    return os.environ.get(RUN_MARK, "")


def choose_accelerator(kind: str, local_index: int | None = None) -> None:
    """Tells deepspeed, before it is imported, to use cpu or cuda. It takes LOCAL_RANK for the device's index, which the
    launcher sets wrongly if hosts have different numbers of slots."""
    os.environ["DS_ACCELERATOR"] = kind
    if local_index is not None:
        os.environ["LOCAL_RANK"] = str(local_index)


def prefer_interface(name: str) -> None:
    """Makes gloo and NCCL use this network interface, unless the user has set another."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def extend(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `variables`, for a child that is to import the same package."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)}


def read_rank(plan: Plan) -> int:
    """This process's rank. `UserError`: the launched ranks are not those of the plan."""
    try:
        rank, world_size = read_place()
    except (KeyError, ValueError):
        raise UserError(
            "RANK and WORLD_SIZE are not set: serve runs under the deepspeed launcher; start it with `ds-llmpq run`, "
            "or as `deepspeed --hostfile FILE --module ds_llmpq.commands.serve plan=...`."
        ) from None
    if world_size != len(plan.stages):
        raise UserError(
            f"The plan has {pluralize(len(plan.stages), 'stage')}, but {pluralize(world_size, 'rank')} started; use "
            "the hostfile (and the --include line) that `plan` wrote beside plan.json."
        )
    ranks = sorted(stage.rank for stage in plan.stages)
    if ranks != list(range(world_size)):
        raise UserError(f"The plan's stages have ranks {ranks} instead of each from 0 to {world_size - 1}; plan again.")
    host = next(stage.host for stage in plan.stages if stage.rank == rank)
    planned = sum(1 for stage in plan.stages if stage.host == host)
    started = int(os.environ.get("LOCAL_SIZE", planned))
    if started != planned:
        raise UserError(
            f"The plan puts {pluralize(planned, 'stage')} on host {host}, but {pluralize(started, 'rank')} started on "
            f"the host of rank {rank}; use the hostfile that `plan` wrote beside plan.json."
        )
    return rank


def find_local_rank(plan: Plan, rank: int) -> int:
    """Index of a rank among those of its host, in slot order, as the launcher renumbers the used slots."""
    hosts = {stage.rank: stage.host for stage in plan.stages}
    return sum(1 for other in hosts if hosts[other] == hosts[rank] and other < rank)
