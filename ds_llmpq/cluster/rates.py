"""A two-second measurement of a CPU thread group or a GPU: memory read bandwidth and matrix rates by compute dtype.

torch is imported only here, when asked; without it numpy measures float32.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

CALIBRATE = "DS_LLMPQ_CALIBRATE"  # environment variable: what planner.calibrate=auto stands for
READ_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # beyond any cache
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


def time_best(
    action: Callable[[], Any], budget_seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest of as many runs as fit into the budget (at least three, the first one thrown away).

    The minimum, because other processes can only add time.
    """
    action()
    shortest, begin, runs = float("inf"), clock(), 0
    while runs < 2 or clock() - begin < budget_seconds:
        start = clock()
        action()
        shortest = min(shortest, clock() - start)
        runs += 1
    return shortest


def measure_cpu(threads: int, seconds: float = 2.0) -> dict[str, Any]:
    """Device type fields with the rates of one thread while `threads` of them work (`detect`'s `cpu_rates`)."""
    try:
        import torch
    except ImportError:
        bandwidth, rates = _measure_numpy(seconds)
        threads, how = 1, "numpy, its own threads counted as one"
    else:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            bandwidth, rates = _measure_torch(torch, torch.device("cpu"), seconds)
        finally:
            torch.set_num_threads(before)
        how = f"torch {torch.__version__}, {threads} threads"
    return {
        "memory_bandwidth_bytes_per_second": round(bandwidth / threads),
        "flops_per_second": {dtype: float(round(rate / threads)) for dtype, rate in rates.items()},
        "source": f"measured on this host: {how}; kernel_overhead_seconds is the shipped figure",
    }


def measure_gpu(slot: int, seconds: float = 2.0) -> dict[str, Any] | None:
    """Device type fields of the GPU in this slot (PCI order); None where torch cannot use it."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # before CUDA counts its devices
    try:
        import torch
    except ImportError:
        return None
    if slot >= torch.cuda.device_count():
        return None
    bandwidth, rates = _measure_torch(torch, torch.device("cuda", slot), seconds)
    return {
        "memory_bandwidth_bytes_per_second": round(bandwidth),
        "flops_per_second": {dtype: float(round(rate)) for dtype, rate in rates.items()},
        "source": f"measured on this host: torch {torch.__version__}; kernel_overhead_seconds is the shipped figure",
    }


def _measure_torch(torch: Any, device: Any, seconds: float) -> tuple[float, dict[str, float]]:
    """(bytes/s, {dtype: FLOP/s}) of the device; a dtype slower than a tenth of float32 is left out as unusable."""
    size, read = MATRIX_SIZE[device.type], READ_BYTES[device.type]

    def best(action: Callable[[], Any], budget: float) -> float:
        def timed() -> None:
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return time_best(timed, budget)

    with torch.no_grad():
        data = torch.ones(read // 4, device=device)
        bandwidth = read / best(data.sum, seconds / 3)
        del data
        rates = {}
        for dtype in ("float32", "bfloat16", "float16"):
            matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
            rates[dtype] = 2 * size**3 / best(lambda matrix=matrix: matrix @ matrix, seconds / 9)
    return bandwidth, {dtype: rate for dtype, rate in rates.items() if rate >= 0.1 * rates["float32"]}


def _measure_numpy(seconds: float) -> tuple[float, dict[str, float]]:
    import numpy

    size = MATRIX_SIZE["cpu"]
    data = numpy.ones(READ_BYTES["cpu"] // 4, numpy.float32)
    matrix = numpy.ones((size, size), numpy.float32)
    bandwidth = READ_BYTES["cpu"] / time_best(data.sum, seconds / 3)
    return bandwidth, {"float32": 2 * size**3 / time_best(lambda: matrix @ matrix, seconds / 3)}
