"""`detect`: this machine as a cluster, written as a valid conf/cluster entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.cluster.cluster_file import write_cluster
from ds_llmpq.cluster.detect import count_usable_cores, detect
from ds_llmpq.cluster.rates import measure_cpu, measure_gpu
from ds_llmpq.cluster.saved import build_links, parse_saved_gpus, parse_topology
from ds_llmpq.commands.config import DetectConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import read_text
from ds_llmpq.report.plan_table import format_size, format_table


def run(settings: DetectConfig, out: Path) -> int:
    cluster = _read_saved(settings) if settings.gpus else _this_host(settings)
    out.mkdir(parents=True, exist_ok=True)
    write_cluster(out / "cluster.yaml", cluster)
    types = cluster["device_types"]
    rows = [
        [
            f"{host['name']}:{device['slot']}",
            device["type"],
            format_size(device["memory_bytes"]),
            types[device["type"]]["source"],
        ]
        for host in cluster["hosts"]
        for device in host["devices"]
    ]
    print(format_table(["device", "type", "memory", "rates"], rows))
    print(f"links: {cluster['links']['source']}")
    print(f"cluster: {out / 'cluster.yaml'} (use it with cluster_file={out / 'cluster.yaml'})")
    return 0


def _this_host(settings: DetectConfig) -> dict[str, Any]:
    if settings.topology:
        raise UserError("topology=FILE belongs to saved GPUs; give gpus=FILE as well.")
    stages = settings.cpu_stages
    rates = measure_cpu(count_usable_cores() if stages is None else max(stages, 1)) if settings.measure else None
    gpus = measure_gpu if settings.measure else lambda slot: None
    return detect(config.known_device_types(), settings.host, stages, cpu_rates=rates, measure_gpu=gpus)


def _read_saved(settings: DetectConfig) -> dict[str, Any]:
    """Another host, from files saved there; its CPUs are not offered."""
    if settings.cpu_stages:
        raise UserError("cpu_stages are of this host and cannot be told from gpus=FILE; leave one of them out.")
    gpus = parse_saved_gpus(_read(settings.gpus))
    cluster = detect(config.known_device_types(), settings.host, 0, gpus)
    if settings.topology:
        cluster["links"] = build_links(gpus, parse_topology(_read(settings.topology)), settings.host)
    return cluster


def _read(name: str) -> str:
    return read_text(config.make_absolute(name), "table", "give a text file saved from nvidia-smi")
