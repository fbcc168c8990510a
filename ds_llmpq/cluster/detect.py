"""Detects this host's GPUs (with nvidia-smi, without torch), CPU cores and free memory, as an entry of `conf/cluster`.

With several hosts, each detects itself, and the answers are merged (`cluster_file.merge`).
"""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.cluster.config import DeviceTypeConfig
from ds_llmpq.errors import UserError, quote

MIB = 1 << 20
GPU_FIELDS = ("index", "pci.bus_id", "name", "memory.total", "memory.free", "compute_cap")
# what a process needs beside its stage; measured: 405 MiB for a CPU stage after its imports
CPU_PROCESS_BYTES = 512 * MIB
# the published calibration of usable GPU memory, 0.95 x total - 1930 MiB, applied to the free memory
GPU_SHARE, GPU_CONTEXT_BYTES = 0.95, 1930 * MIB
CPU_SHARE = 0.9
# (pattern in nvidia-smi's name, smallest total MiB, device type of conf/device); the first match counts
KNOWN_GPUS = (
    (r"\bB200\b", 0, "b200"),
    (r"\bGH200\b", 120_000, "gh200_144"),
    (r"\bGH200\b", 0, "gh200_96"),
    (r"\bH200\b", 0, "h200"),
    (r"\bH100 NVL\b", 0, "h100_nvl"),
    (r"\bH100 PCIe\b", 0, "h100_pcie"),
    (r"\bH100\b", 0, "h100"),
    (r"\bH20\b", 0, "h20"),
    (r"\bA100\b", 60_000, "a100_80"),
    (r"\bA100\b", 0, "a100_40"),
    (r"\bV100\b", 0, "v100"),
    (r"\bP100\b", 0, "p100"),
    (r"\b(A2|A10|A10G|A16|A30|A40|L4|L40|L40S|T4)\b", 0, r"\1"),
    (r"\bRTX (A4000|A5000|A6000|6000 Ada)\b", 0, r"rtx_\1"),
    (r"\bRTX PRO 6000 Blackwell Workstation\b", 0, "rtx_pro_6000"),
    (r"\bRTX 3060$", 11_000, "rtx_3060"),  # the card of 8 GB reads a third slower
    (r"\bRTX 3050$", 7_000, "rtx_3050"),  # the card of 6 GB reads a quarter slower
    (r"\bGeForce RTX (?!30[56]0$)(\d{4}(?: Ti)?(?: SUPER)?)$", 0, r"rtx_\1"),
)
FALLBACK_GPU = "t4"  # the slowest type that still has fast half-precision arithmetic
DATASHEET_LINKS = {
    "intra_host": {"latency_seconds": 1.0e-5, "bandwidth_bytes_per_second": 1.2e10},
    "inter_host": {"latency_seconds": 5.0e-5, "bandwidth_bytes_per_second": 1.1e10},
}
LINK_SOURCE = "datasheet: PCIe 3.0 x16 inside a host, 100 Gb/s Ethernet between hosts; not measured here"
# gloo over loopback, half a round trip of 8 B and of 1 MiB, measured on a busy two-core machine
LOOPBACK = {"latency_seconds": 5.0e-5, "bandwidth_bytes_per_second": 4.0e9}
LOOPBACK_SOURCE = "measured on another machine: gloo over loopback; between hosts 100 Gb/s Ethernet, datasheet"


@dataclass(frozen=True)
class Gpu:
    index: int
    bus_id: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: str


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs from nvidia-smi's CSV (GPU_FIELDS, no header, no units), in PCI order. UserError: a line it cannot read."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if not row:
            continue
        try:
            index, bus_id, name, total, free, capability = (field.strip() for field in row)
            if len(total) > 12 or len(free) > 12:
                raise ValueError("more memory than there is")
            gpus.append(Gpu(int(index), bus_id, name, int(total) * MIB, int(free) * MIB, capability))
        except ValueError:
            raise UserError(
                f"nvidia-smi answered {quote(','.join(row), 200)}; expected {', '.join(GPU_FIELDS)}"
            ) from None
    return sorted(gpus, key=lambda gpu: gpu.bus_id)


def query_gpus(run: Callable[..., Any] = subprocess.run) -> list[Gpu]:
    """This host's GPUs; none if nvidia-smi is missing or finds no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(result.stdout) if result.returncode == 0 else []


def list_free_slots(gpus: Sequence[Gpu], visible: str | None) -> list[int]:
    """Slots of the GPUs that `visible` (CUDA_VISIBLE_DEVICES) lists and that are not full; if all are full, all that it
    lists. UserError: it does not number GPUs."""
    listed = list(range(len(gpus)))
    if visible is not None:
        words = [word.strip() for word in visible.split(",") if word.strip() not in ("", "-1")]
        if not all(word.isdecimal() and len(word) < 5 for word in words):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={quote(visible)} does not number GPUs; give numbers in PCI order, or "
                "the devices in a cluster_file=FILE that `ds-llmpq detect` wrote"
            )
        listed = [slot for slot in listed if slot in set(map(int, words))]
    return [slot for slot in listed if _free_for_stage(gpus[slot].free_bytes) > 0] or listed


def find_type(gpu: Gpu) -> str | None:
    """The name of its type, whether or not conf/device has it; None if unknown, as for laptops, whose GPUs have the
    names of faster cards."""
    words = gpu.name.replace("-", " ")
    if re.search(r"\b(Laptop|Mobile|Max Q)\b", words):
        return None
    for pattern, smallest_mib, name in KNOWN_GPUS:
        if (match := re.search(pattern, words)) and gpu.total_bytes >= smallest_mib * MIB:
            return match.expand(name).lower().replace(" ", "_")
    return None


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that new processes can get: MemAvailable, or what the control group has left if that is less."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    if match is None:
        raise UserError(f"{proc / 'meminfo'} has no MemAvailable; give memory_bytes in the cluster file by hand")
    available = int(match[1]) * 1024
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            available = min(available, int(limit) - int(used) + _cached_file_bytes(cgroup))
    except (OSError, ValueError):  # no control group, or an older layout: MemAvailable stands
        pass
    return available


def _cached_file_bytes(cgroup: Path) -> int:
    """Bytes of cached file pages, which count as used, but are freed when memory is needed."""
    try:
        found = re.search(r"^inactive_file (\d+)", (cgroup / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def count_memory_kills(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes the kernel has killed for lack of memory: in this control group, or on the host if no group
    counts them."""
    for counter in (cgroup / "memory.events", proc / "vmstat"):
        try:
            if found := re.search(r"^oom_kill (\d+)", counter.read_text(), re.MULTILINE):
                return int(found[1])
        except OSError:
            continue
    return 0


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this host's processor multiplies in bfloat16; if not, bfloat16 is slower than float32. True if
    unknown."""
    try:
        found = re.search(r"^(flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return True
    return found is None or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(found[2].split()))


def count_usable_cores(cpus: Path = Path("/sys/devices/system/cpu"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processor cores that this process may keep busy: those of its affinity (two threads of a core count once), but no
    more than the control group's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(cpu))
    try:
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return max(1, min(len(cores), quota // period))
    except (OSError, ValueError):  # no control group, or one without a quota
        return len(cores)


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def detect(
    known: Mapping[str, DeviceTypeConfig],
    host: str = "localhost",
    cpu_stages: int | None = None,
    gpus: Sequence[Gpu] | None = None,
    cpu_rates: Mapping[str, Any] | None = None,
    measure_gpu: Callable[[int], Mapping[str, Any] | None] = lambda slot: None,
    slots: Collection[int] | None = None,
) -> dict[str, Any]:
    """This host as the plain content of a conf/cluster entry.

    known: device types of conf/device by name, including `cpu_core` and the fallback GPU.
    cpu_stages: number of CPU devices, which share cores and memory evenly; None: one if the host has no GPU.
    gpus: None asks nvidia-smi. cpu_rates: fields from `rates.measure_cpu` that replace those of cpu_core.
    measure_gpu: measures a GPU of unknown type, by its slot; returns its fields, or None if it cannot be measured.
    slots: the GPUs to use; None: all.
    """
    chosen = {
        slot: gpu for slot, gpu in enumerate(query_gpus() if gpus is None else gpus) if slots is None or slot in slots
    }
    cpu_stages = (0 if chosen else 1) if cpu_stages is None else cpu_stages
    cores = count_usable_cores()
    if not 0 <= cpu_stages <= cores:
        raise UserError(f"cpu_stages={cpu_stages} does not fit this host; it must be from 0 to its {cores} cores")
    types: dict[str, Any] = {}
    devices = [_gpu_device(slot, gpu, known, types, measure_gpu) for slot, gpu in chosen.items()]
    if cpu_stages:
        types["cpu_core"] = {**_copy_type(known, "cpu_core"), **(cpu_rates or {})}
        share = int(CPU_SHARE * available_memory_bytes() / cpu_stages) - CPU_PROCESS_BYTES
        if share <= 0:
            raise UserError(f"{cpu_stages} CPU stages leave no memory for any of them; use fewer")
        first = max(chosen, default=-1) + 1
        for slot in range(first, first + cpu_stages):
            devices.append({"type": "cpu_core", "slot": slot, "memory_bytes": share, "threads": cores // cpu_stages})
    if not devices:
        raise UserError("this host offers no device; give cpu_stages=1 or more")
    return {
        "name": host,
        "device_types": types,
        "hosts": [{"name": host, "devices": devices}],
        "links": _links(only_cpu=not chosen),
        # slots are PCI order; CUDA's own default numbers the fastest device first
        "env": {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if chosen else {},
    }


def _links(only_cpu: bool) -> dict[str, Any]:
    if only_cpu:
        return {**DATASHEET_LINKS, "intra_host": LOOPBACK, "pairs": [], "source": LOOPBACK_SOURCE}
    return {**DATASHEET_LINKS, "pairs": [], "source": LINK_SOURCE}


def _gpu_device(
    slot: int,
    gpu: Gpu,
    known: Mapping[str, DeviceTypeConfig],
    types: dict[str, Any],
    measure: Callable[[int], Mapping[str, Any] | None],
) -> dict[str, Any]:
    name = find_type(gpu)
    if name is None or name not in known:
        name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", gpu.name.lower()).strip("_")
        if name not in types:
            types[name] = _unknown_gpu(gpu, known) | (measure(slot) or {})
    else:
        types[name] = _copy_type(known, name)
    return {"type": name, "slot": slot, "memory_bytes": _usable_gpu_bytes(gpu.free_bytes)}


def _unknown_gpu(gpu: Gpu, known: Mapping[str, DeviceTypeConfig]) -> dict[str, Any]:
    """The fallback type's rates with this GPU's memory and capability."""
    fields = _copy_type(known, FALLBACK_GPU)
    fields["memory_bytes"] = _usable_gpu_bytes(gpu.total_bytes)
    fields["compute_capability"] = gpu.compute_capability
    if int(gpu.compute_capability.split(".")[0] or 0) >= 8 and "float16" in fields["flops_per_second"]:
        fields["flops_per_second"]["bfloat16"] = fields["flops_per_second"]["float16"]
    fields["source"] = f"assumed: {gpu.name} is not a known type, so the rates are those of {FALLBACK_GPU}; profile it"
    return fields


def _usable_gpu_bytes(free_bytes: int) -> int:
    """Memory for a stage, less its process's CUDA context and what the allocator wastes."""
    usable = _free_for_stage(free_bytes)
    if usable <= 0:
        raise UserError(f"a GPU has only {free_bytes // MIB} MiB free, too little to start on; end what fills it")
    return usable


def _free_for_stage(free_bytes: int) -> int:
    return int(GPU_SHARE * free_bytes) - GPU_CONTEXT_BYTES


def _copy_type(known: Mapping[str, DeviceTypeConfig], name: str) -> dict[str, Any]:
    if name not in known:
        raise UserError(f"conf/device has no {name}; detection needs it for its rates")
    return asdict(known[name])
