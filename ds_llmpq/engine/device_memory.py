"""Memory a rank uses, measured: of the process on a CPU, of the allocator on a GPU.

A process's resident memory counts pages of mapped files, i.e. of libraries and of a checkpoint while it is read. The
system drops those when it needs room, so `held_bytes` and `held_peak_bytes` leave them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import torch

_PAGE_BYTES = resource.getpagesize()


def used_bytes(device: torch.device) -> int:
    """What this process holds now: resident memory (CPU) or allocated device memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def held_bytes(device: torch.device) -> int:
    """`used_bytes` without pages of mapped files."""
    return used_bytes(device) - _file_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most this process held since it began, or since `restart_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # without Linux's status: never less than what the process that started this one held at that moment
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_peak_bytes(device: torch.device) -> int:
    """`peak_bytes` without the pages of mapped files that are resident now."""
    return peak_bytes(device) - _file_bytes(device)


def restart_peak(device: torch.device) -> None:
    """Forgets the peak so far, where the system lets a process do so (Linux does)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _file_bytes(device: torch.device) -> int:
    return 0 if device.type == "cuda" else _status("RssFile")


def _status(name: str) -> int:
    """Bytes that Linux notes of this process under `name`; 0 where it notes none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def release_freed() -> None:
    """Gives memory that loading used and freed back to the operating system, where the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_cached(device: torch.device) -> None:
    """Gives back what the allocators keep for later."""
    release_freed()
    if device.type == "cuda":
        torch.cuda.empty_cache()
