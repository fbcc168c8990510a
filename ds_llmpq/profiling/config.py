"""Configuration group `profiling`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ProfilingConfig:
    """How long `profile` takes, and how finely it looks."""

    seconds: float = 200.0  # for all device types together, beside loading; the workload's own points come first
    rounds: int = 3  # passes over all points: a disturbance then hits one round of many points, not all of one
    links: bool = True  # also the links between this host's devices, and what a pass costs beside its layers
    chained_layers: int = 4  # decoder layers timed one after another, so that caches are as cold as in the engine
