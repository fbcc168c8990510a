"""`detect`: describes this machine, or several hosts asked over ssh, in a cluster file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.cluster_file import merge, write_cluster
from ds_llmpq.cluster.detect import count_usable_cores, detect, query_gpus
from ds_llmpq.cluster.hostfile import parse_hostfile
from ds_llmpq.cluster.rates import measure_cpu, measure_gpu
from ds_llmpq.cluster.saved import build_links, parse_saved_gpus, parse_topology
from ds_llmpq.commands.config import DetectConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import read_text
from ds_llmpq.launch.hosts import ask_hosts
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.wording import format_size, quote_argument

_MODULE = "ds_llmpq.commands.detect"


def run(settings: DetectConfig, out: Path) -> int:
    if settings.hostfile:
        cluster = _ask_hosts(settings)
    else:
        cluster = _read_saved(settings) if settings.gpus else _this_host(settings)
    write_and_show(cluster, out)
    return 0


def write_and_show(cluster: dict[str, Any], out: Path) -> None:
    """Writes `out`/cluster.yaml and prints a table of it. `UserError`: it is not a valid cluster."""
    Cluster.from_config(config.parse_cluster(cluster))
    out.mkdir(parents=True, exist_ok=True)
    write_cluster(out / "cluster.yaml", cluster)
    types = cluster["device_types"]
    rows = [
        [
            f"{host['name']}:{device['slot']}",
            device["type"],
            format_size(device["memory_bytes"] or types[device["type"]]["memory_bytes"]),
            types[device["type"]]["source"],
        ]
        for host in cluster["hosts"]
        for device in host["devices"]
    ]
    print(format_table(["device", "type", "memory", "rates"], rows))
    for name in dict.fromkeys(row[1] for row in rows if row[3].startswith("assumed")):
        print(f"note: the rates of {name} are {types[name]['source']}", file=sys.stderr)
    print(f"links: {cluster['links']['source']}")
    print(f"cluster: {out / 'cluster.yaml'} (use it with {quote_argument('cluster_file', out / 'cluster.yaml')})")


def _ask_hosts(settings: DetectConfig) -> dict[str, Any]:
    if settings.gpus or settings.topology or settings.cpu_stages is not None or settings.host != "localhost":
        raise UserError("hostfile=FILE names hosts and their devices; leave out gpus, topology, host and cpu_stages.")
    slots = parse_hostfile(config.make_absolute(settings.hostfile))
    questions = {host: ["-m", _MODULE, host, str(count), str(int(settings.measure))] for host, count in slots.items()}
    return merge(ask_hosts(questions, settings.timeout_seconds), "detected")


def _answer(host: str, slots: int, measure: bool) -> dict[str, Any]:
    """On the host that was asked: its first `slots` GPUs, or its processor as so many stages."""
    has_gpus = bool(query_gpus())
    cluster = _this_host(DetectConfig(host=host, cpu_stages=None if has_gpus else slots, measure=measure))
    devices = cluster["hosts"][0]["devices"]
    if len(devices) < slots:
        raise UserError(f"it has {len(devices)} GPUs, fewer than its {slots} slots")
    del devices[slots:]
    return cluster


def _this_host(settings: DetectConfig) -> dict[str, Any]:
    if settings.topology:
        raise UserError("topology=FILE belongs to saved GPUs; give gpus=FILE as well.")
    stages = settings.cpu_stages
    rates = measure_cpu(count_usable_cores() if stages is None else max(stages, 1)) if settings.measure else None
    gpus = measure_gpu if settings.measure else lambda slot: None
    return detect(config.read_device_types(), settings.host, stages, cpu_rates=rates, measure_gpu=gpus)


def _read_saved(settings: DetectConfig) -> dict[str, Any]:
    """Another host, from files saved there; its CPUs are not offered."""
    if settings.cpu_stages:
        raise UserError("cpu_stages is for this host, but gpus=FILE describes another one; leave one of them out.")
    gpus = parse_saved_gpus(_read(settings.gpus))
    cluster = detect(config.read_device_types(), settings.host, 0, gpus)
    if settings.topology:
        cluster["links"] = build_links(gpus, parse_topology(_read(settings.topology)), settings.host)
    return cluster


def _read(name: str) -> str:
    return read_text(config.make_absolute(name), "table", "give a text file saved from nvidia-smi")


if __name__ == "__main__":  # on a host of a hostfile
    try:
        print(json.dumps(_answer(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))))
    except UserError as error:
        sys.exit(f"error: {error}")
