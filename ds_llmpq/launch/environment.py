"""Environment variables of the ranks: which ones a file from outside may set, what the launcher says in them, and what
must be set before a library reads it. Imports no torch.

A variable can name a library to load (LD_PRELOAD, NCCL_NET_PLUGIN, OMP_TOOL_LIBRARIES), a program, a place to import
from, or a file to write (NCCL_DEBUG_FILE). What a plan or a cluster file brings along is therefore held to this list;
what the user gives on the command line as `cluster.env` is their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ds_llmpq.errors import UserError, quote
from ds_llmpq.plan import Plan

RUN_MARK = "DS_LLMPQ_RUN"  # names the run that a process belongs to

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
    """`UserError` for a variable of the file `where` that is not in `FROM_FILES`, unless `asked`, the user's own
    cluster.env, has it with the same value."""
    for name, value in env.items():
        if name not in FROM_FILES and asked.get(name) != value:
            raise UserError(
                f"{where} sets the environment variable {quote(name)} to {quote(value)} for every rank, which a file "
                "may not; remove it there, or ask for it yourself on the command line with "
                f"'+cluster.env.{quote(name)[1:-1]}=VALUE' and that value."
            )


def read_place() -> tuple[int, int]:
    """This process's rank, and how many there are. `KeyError` or `ValueError`: no launcher has said it."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def read_meeting_place() -> tuple[str, int]:
    """Address and port of rank 0."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def read_mark() -> str:
    """The run's own; empty where the ranks were started by hand."""
    return os.environ.get(RUN_MARK, "")


def choose_accelerator(kind: str, local_index: int | None = None) -> None:
    """cpu or cuda: deepspeed looks for an accelerator when it is imported. It takes LOCAL_RANK for the device's index;
    the launcher's is wrong where hosts have unequal slots."""
    os.environ["DS_ACCELERATOR"] = kind
    if local_index is not None:
        os.environ["LOCAL_RANK"] = str(local_index)


def prefer_interface(name: str) -> None:
    """gloo and NCCL talk over this network interface, unless the user has named another."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def extend(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `variables`, for a child that imports this very package."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)}


def read_rank(plan: Plan) -> int:
    """This process's rank. `UserError` where what was launched is not what was planned."""
    try:
        rank, world_size = read_place()
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
