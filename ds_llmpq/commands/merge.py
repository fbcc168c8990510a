"""`merge`: the hosts of several cluster files as one cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.cluster_file import merge
from ds_llmpq.commands.config import MergeConfig
from ds_llmpq.commands.detect import write_and_show


def run(settings: MergeConfig, out: Path) -> int:
    found = [config.read_cluster(config.make_absolute(file)) for file in settings.files]
    for cluster in found:
        Cluster.from_config(cluster)  # says what is wrong with one file before it is one of many
    write_and_show(merge([asdict(cluster) for cluster in found], settings.name), out)
    return 0
