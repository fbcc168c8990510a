"""Finds a temporary folder on a disk. Many systems keep /tmp in memory, where OpenVINO's constants would stay beside
the layout that it packs them into.
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
    """TMPDIR if the user sets it, else the system's folder, or /var/tmp if only the former is in memory."""
    folder = tempfile.gettempdir()
    if "TMPDIR" in os.environ or not in_memory(folder):
        return folder
    usable = os.access(_ON_DISK, os.W_OK) and not in_memory(_ON_DISK)
    return _ON_DISK if usable else folder


def in_memory(folder: str) -> bool:
    """Whether the folder is on a file system in memory; False if that is unknown."""
    path = Path(folder).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    nearest = next((mounts[place] for place in (path, *path.parents) if place in mounts), "")
    return nearest in _IN_MEMORY
