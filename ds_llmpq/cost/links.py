"""What stages send to each other, and the link table of a planning problem."""

from __future__ import annotations

from typing import Any

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.devices import Link
from ds_llmpq.models.shape import ModelShape

TOKEN_BYTES = 8  # a token travels back as one int64


def hidden_bytes_per_token(shape: ModelShape, dtype_bytes: int) -> int:
    """One token's hidden state on its way to the next stage."""
    return shape.hidden * dtype_bytes


def link_table(cluster: Cluster, shape: ModelShape, dtype_bytes: int) -> dict[str, Any]:
    """`links` of problem.json: inter-host as the default, every other ordered pair of devices listed."""
    default = cluster.links.inter_host or cluster.links.intra_host
    names = [device.name for device in cluster.devices]
    between = {(a, b): cluster.link(a, b) for a in names for b in names if a != b}
    pairs = [{"from": a, "to": b, **_entry(link)} for (a, b), link in between.items() if link != default]
    return {
        "default": _entry(default) if default else {"latency_seconds": 0.0, "seconds_per_byte": 0.0},
        "pairs": pairs,
        "hidden_bytes_per_token": hidden_bytes_per_token(shape, dtype_bytes),
        "token_bytes": TOKEN_BYTES,
    }


def _entry(link: Link) -> dict[str, float]:
    return {"latency_seconds": link.latency_seconds, "seconds_per_byte": link.seconds_per_byte}
