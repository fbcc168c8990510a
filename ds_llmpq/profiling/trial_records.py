"""What a trial pipeline found, as rows of profile.csv and links.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.linktable import Message, write_links
from ds_llmpq.cost.profile import Point, Sample
from ds_llmpq.launch.launcher import is_local


def pass_sample(kind: DeviceType, entry: dict[str, Any]) -> Sample:
    point = Point(kind.name, entry["part"], entry["phase"], 0, entry["batch"], entry["length_tokens"])
    return Sample(point, entry["round"], 1, 1, entry["seconds"], entry["seconds"], 0.0)


def write_link_table(file: Path, cluster: Cluster, found: list[dict[str, Any]]) -> None:
    """For every ordered pair of this host's devices: between processes of one host the link is the same."""
    local = [device.name for device in cluster.devices if is_local(device.host)]
    pairs = [(a, b) for a in local for b in local if a != b] or [(local[0], local[0])]
    messages = []
    for source, target in pairs:
        for entry in found:
            times = entry["seconds"]
            middle = times[len(times) // 2]
            messages.append(
                Message(source, target, entry["channel"], entry["bytes"], len(times), middle, times[0])
            )  # fmt: skip
    write_links(file, messages)
