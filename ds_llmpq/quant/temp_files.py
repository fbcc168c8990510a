"""Where files lie whose pages shall not take memory: on a disk.

Many systems keep /tmp in memory, and constants that OpenVINO reads from there would be held for good beside what it
has packed them into.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import psutil

_IN_MEMORY = ("tmpfs", "ramfs")
_ON_DISK = "/var/tmp"


@cache
def find_temp_folder() -> str:
    """The user's TMPDIR, or else the system's folder, or /var/tmp where that one is in memory and this one is not."""
    folder = tempfile.gettempdir()
    if "TMPDIR" in os.environ or not in_memory(folder):
        return folder
    usable = os.access(_ON_DISK, os.W_OK) and not in_memory(_ON_DISK)
    return _ON_DISK if usable else folder


def in_memory(folder: str) -> bool:
    """Whether the folder's file system is kept in memory; False where the system does not say."""
    path = Path(folder).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    nearest = next((mounts[place] for place in (path, *path.parents) if place in mounts), "")
    return nearest in _IN_MEMORY
