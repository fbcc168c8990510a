"""A two-second measurement of one CPU thread group: memory read bandwidth and matrix rates by arithmetic type.

torch is imported only here, when asked; without it numpy measures float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

READ_BYTES = 256 << 20  # beyond any cache
MATRIX_SIZE = 1024


def best_seconds(
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
            bandwidth, rates = _measure_torch(torch, seconds)
        finally:
            torch.set_num_threads(before)
        how = f"torch {torch.__version__}, {threads} threads"
    return {
        "memory_bandwidth_bytes_per_second": round(bandwidth / threads),
        "flops_per_second": {dtype: float(round(rate / threads)) for dtype, rate in rates.items()},
        "source": f"measured on this host: {how}; kernel_overhead_seconds is the shipped figure",
    }


def _measure_torch(torch: Any, seconds: float) -> tuple[float, dict[str, float]]:
    """(bytes/s, {dtype: FLOP/s}) of all threads; a type slower than a tenth of float32 is left out as unusable."""
    with torch.no_grad():
        data = torch.ones(READ_BYTES // 4)
        bandwidth = READ_BYTES / best_seconds(data.sum, seconds / 3)
        rates = {}
        for dtype in ("float32", "bfloat16", "float16"):
            matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=getattr(torch, dtype))
            rates[dtype] = 2 * MATRIX_SIZE**3 / best_seconds(lambda matrix=matrix: matrix @ matrix, seconds / 9)
    return bandwidth, {dtype: rate for dtype, rate in rates.items() if rate >= 0.1 * rates["float32"]}


def _measure_numpy(seconds: float) -> tuple[float, dict[str, float]]:
    import numpy

    data = numpy.ones(READ_BYTES // 4, numpy.float32)
    matrix = numpy.ones((MATRIX_SIZE, MATRIX_SIZE), numpy.float32)
    bandwidth = READ_BYTES / best_seconds(data.sum, seconds / 3)
    return bandwidth, {"float32": 2 * MATRIX_SIZE**3 / best_seconds(lambda: matrix @ matrix, seconds / 3)}
