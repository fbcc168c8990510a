"""A two-second measurement of a CPU thread group or a GPU: memory read bandwidth and matrix rates by compute dtype.

torch is imported only in the process that measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.files import cache_folder, one_at_a_time, read_json, write_json

CALIBRATE = "DS_LLMPQ_CALIBRATE"  # environment variable: what planner.calibrate=auto stands for

_BUSY = 0.5  # of the threads to be measured, as the load of the last minute
READ_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # beyond any cache
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


def time_best(
    action: Callable[[], Any], budget_seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest of as many runs as fit into the budget: at least three, of which the first does not count. The
    minimum, because other processes can only add time."""
    action()
    shortest, begin, runs = float("inf"), clock(), 0
    while runs < 2 or clock() - begin < budget_seconds:
        start = clock()
        action()
        shortest = min(shortest, clock() - start)
        runs += 1
    return shortest


def recall_rates(kind: str, number: int, hardware: str) -> dict[str, Any] | None:
    """The result of `measure_cpu(number)` or `measure_gpu(number)`, measured once for this hardware and torch version
    and kept in the user's cache folder. A separate process measures, so that this one keeps no torch, threads or CUDA
    context. None: it cannot be measured, the processor is busy, or DS_LLMPQ_CALIBRATE=never."""
    if os.environ.get(CALIBRATE) == "never":
        return None
    key = f"{kind} {hardware}, torch {version('torch')}"
    file = cache_folder() / "rates.json"
    try:
        with one_at_a_time(file.parent):
            kept = _read_kept(file)
            if key not in kept:
                if kind == "cpu" and os.getloadavg()[0] > _BUSY * number:  # too low a rate would be kept for good
                    return None
                command = [sys.executable, "-m", __name__, kind, str(number)]
                env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
                answer = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
                kept[key] = json.loads(answer.stdout)
                write_json(file, kept)
            return kept[key]
    except (OSError, ValueError, UserError, subprocess.SubprocessError):
        return None


def _read_kept(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file, "rates", "delete it"))
    except (UserError, TypeError, ValueError):  # there is none yet, or it is damaged
        return {}


def measure_cpu(threads: int, seconds: float = 2.0) -> dict[str, Any]:
    """Device type fields with the rates of one thread while `threads` of them work (`detect`'s `cpu_rates`)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bandwidth, rates = _measure(torch.device("cpu"), seconds)
    finally:
        torch.set_num_threads(before)
    return _describe(
        bandwidth / threads, {dtype: rate / threads for dtype, rate in rates.items()}, f", {threads} threads"
    )


def measure_gpu(slot: int, seconds: float = 2.0) -> dict[str, Any] | None:
    """Device type fields of the GPU in this slot (PCI order); None if torch cannot use it."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # before CUDA counts its devices
    import torch

    return _describe(*_measure(torch.device("cuda", slot), seconds)) if slot < torch.cuda.device_count() else None


def _describe(bandwidth: float, rates: dict[str, float], how: str = "") -> dict[str, Any]:
    source = f"measured on this host: torch {version('torch')}{how}; kernel_overhead_seconds is the shipped figure"
    flops = {dtype: float(round(rate)) for dtype, rate in rates.items()}
    return {"memory_bandwidth_bytes_per_second": round(bandwidth), "flops_per_second": flops, "source": source}


def _measure(device: Any, seconds: float) -> tuple[float, dict[str, float]]:
    """(bytes/s, {dtype: FLOP/s}) of the device; a dtype slower than a tenth of float32 is left out as unusable."""
    import torch

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


if __name__ == "__main__":
    print(json.dumps({"cpu": measure_cpu, "cuda": measure_gpu}[sys.argv[1]](int(sys.argv[2]))))
