"""Detected hosts as the plain content of a cluster.yaml: describes, merges and writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError


def describe_devices(cluster: Mapping[str, Any]) -> str:
    """The devices of a detected cluster in one line; equal ones are counted."""
    groups: dict[str, int] = {}
    for host in cluster["hosts"]:
        for device in host["devices"]:
            what = device["type"] + (f" of {device['threads']} threads" if "threads" in device else "")
            name = f"{what} with {device['memory_bytes'] / (1 << 30):.1f} GiB on {host['name']}"
            groups[name] = groups.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in groups.items())


def merge(clusters: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Merges hosts into one cluster. Types that share a name but not their rates get the host's name as a suffix. Links
    that a file lists by pairs stay pairs, as do those of a host whose devices are linked differently from the first's.

    UserError: a host in two files.
    """
    if not clusters:
        raise UserError("there is nothing to merge; give one cluster.yaml a host")
    types: dict[str, Any] = {}
    hosts: list[dict[str, Any]] = []
    env: dict[str, str] = {}
    links = dict(clusters[0]["links"], pairs=[])
    for cluster in clusters:
        suffix = cluster["hosts"][0]["name"]
        names = {}
        for type_name, fields in cluster["device_types"].items():
            same = types.setdefault(type_name, fields) == fields
            names[type_name] = type_name if same else f"{type_name}_{suffix}"
            types.setdefault(names[type_name], fields)
        for host in cluster["hosts"]:
            if any(host["name"] == other["name"] for other in hosts):
                raise UserError(f"host {host['name']} is in two of the files; give each host its own name")
            devices = [{**device, "type": names[device["type"]]} for device in host["devices"]]
            hosts.append({"name": host["name"], "devices": devices})
        links["pairs"] += _list_pairs(cluster, links["intra_host"])
        env.update(cluster.get("env", {}))
    return {"name": name, "device_types": types, "hosts": hosts, "links": links, "env": env}


def _list_pairs(cluster: Mapping[str, Any], usual: Mapping[str, float]) -> list[dict[str, Any]]:
    """The pairs that a file lists, and all pairs inside its hosts if its link is not the usual one."""
    listed = list(cluster["links"].get("pairs") or ())
    own, known = cluster["links"]["intra_host"], {(pair["source"], pair["target"]) for pair in listed}
    if own == usual:
        return listed
    for host in cluster["hosts"]:
        places = [f"{host['name']}:{device['slot']}" for device in host["devices"]]
        between = ((a, b) for a in places for b in places if a != b and (a, b) not in known)
        listed += [{"source": a, "target": b, **own} for a, b in between]
    return listed


def write_cluster(path: str | Path, cluster: Mapping[str, Any]) -> None:
    """`cluster.yaml`: for `cluster_file=`, or as an entry of conf/cluster."""
    import yaml

    header = "# Detected; `source` says which numbers were measured and which come from a datasheet.\n"
    Path(path).write_text(header + yaml.safe_dump(dict(cluster), sort_keys=False), encoding="utf-8")
