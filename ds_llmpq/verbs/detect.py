"""`detect`: this machine as a cluster, written as a valid conf/cluster entry."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.cluster.calibrate import measure_cpu
from ds_llmpq.cluster.detect import detect, usable_cores, write_cluster
from ds_llmpq.report.plan_table import size, table
from ds_llmpq.schema import DetectVerb


def run(settings: DetectVerb, out: Path) -> int:
    stages = settings.cpu_stages
    rates = measure_cpu(usable_cores() if stages is None else max(stages, 1)) if settings.measure else None
    cluster = detect(config.known_device_types(), settings.host, stages, cpu_rates=rates)
    out.mkdir(parents=True, exist_ok=True)
    write_cluster(out / "cluster.yaml", cluster)
    types = cluster["device_types"]
    rows = [
        [
            f"{host['name']}:{device['slot']}",
            device["type"],
            size(device["memory_bytes"]),
            types[device["type"]]["source"],
        ]
        for host in cluster["hosts"]
        for device in host["devices"]
    ]
    print(table(["device", "type", "memory", "rates"], rows))
    print(f"links: {cluster['links']['source']}")
    print(f"cluster: {out / 'cluster.yaml'} (use it with cluster_file={out / 'cluster.yaml'})")
    return 0
