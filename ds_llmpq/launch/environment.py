"""Environment variables of the ranks: which ones a file from outside may set.

A variable can name a library to load (LD_PRELOAD, NCCL_NET_PLUGIN, OMP_TOOL_LIBRARIES), a program, a place to import
from, or a file to write (NCCL_DEBUG_FILE). What a plan or a cluster file brings along is therefore held to this list;
what the user gives on the command line as `cluster.env` is their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_llmpq.errors import UserError, quote

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
