"""Memory a rank uses, measured: resident memory of the process on CPU, the allocator's peak on a GPU."""

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


def peak_bytes(device: torch.device) -> int:
    """The most this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # never less than what the process that started this one held at that moment
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_freed() -> None:
    """Gives memory that loading used and freed back to the operating system, where the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
