"""Memory a rank uses, measured: resident memory of the process on CPU, the allocator's peak on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import torch

_PAGE_BYTES = resource.getpagesize()
# torch's allocator, the C++ library, oneDNN
_OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out_of_memory", "could not create a memory")


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


def release_cached(device: torch.device) -> None:
    """Gives back what the allocators keep for later."""
    release_freed()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there was no memory. On CPU, torch and its libraries say so in words alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
