"""How busy a rank's host is while it serves: what the rank itself uses of the processors, and what all programs do."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import psutil


def _count_busy_seconds() -> float:
    """Processor seconds of all programs of this host, and of others that kept its virtual processors waiting."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    guests = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # counted as user's and nice ones already
    return sum(times.values()) - idle - guests


@dataclass
class ProcessorUse:
    """From the moment it is made."""

    since: float = field(default_factory=time.perf_counter)
    own_before: float = field(default_factory=time.process_time)
    busy_before: float = field(default_factory=_count_busy_seconds)

    def measure(self) -> dict[str, Any]:
        """Seconds since then, and processor seconds of this process and of the whole host in them."""
        return {
            "host": socket.gethostname(),
            "processors": os.cpu_count(),
            "seconds": time.perf_counter() - self.since,
            "own_seconds": time.process_time() - self.own_before,
            "busy_seconds": _count_busy_seconds() - self.busy_before,
        }
