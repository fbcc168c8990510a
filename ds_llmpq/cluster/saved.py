"""Describes another host from files saved there: nvidia-smi's CSV of its GPUs and its topology matrix."""

from __future__ import annotations

import csv
import re
from typing import Any

from ds_llmpq.cluster.detect import GPU_FIELDS, Gpu, parse_gpus
from ds_llmpq.errors import UserError

QUERY = f"nvidia-smi --query-gpu={','.join(GPU_FIELDS)} --format=csv"
LINK_LATENCY_SECONDS = 1.0e-5
NVLINK_BYTES_PER_SECOND = 25e9  # a link in each direction, NVLink 2 to 4
IN_USE = 0.85  # share of the nominal rate, assumed
# PCIe 3.0 x16 where one switch or host bridge joins two GPUs; less across sockets. Assumed.
PATHS = {"PIX": 1.2e10, "PXB": 1.2e10, "PHB": 1.2e10, "NODE": 1.1e10, "SYS": 9.0e9}
SOURCE = "datasheet: kinds of links from a saved `nvidia-smi topo -m`; the share of the nominal rate in use is assumed"


def parse_saved_gpus(text: str) -> list[Gpu]:
    """GPUs in PCI order from the saved answer of QUERY, with or without its header and units.

    UserError: columns are missing, or a line cannot be read.
    """
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
    except csv.Error as error:
        raise UserError(f"the file of GPUs cannot be read as CSV ({error}); save the answer of `{QUERY}`") from None
    if not rows:
        raise UserError(f"the file of GPUs is empty; save the answer of `{QUERY}`")
    names = [re.sub(r"\s*\[.*\]$", "", cell) for cell in rows[0]]
    if "index" in names:
        missing = [field for field in GPU_FIELDS if field not in names]
        if missing:
            raise UserError(f"the file of GPUs has no {' and no '.join(missing)}; save the answer of `{QUERY}`")
        columns = [names.index(field) for field in GPU_FIELDS]
        if any(len(row) <= max(columns) for row in rows[1:]):
            raise UserError(f"a line of the file of GPUs has too few columns; save the answer of `{QUERY}`")
        rows = [[row[column] for column in columns] for row in rows[1:]]
    plain = [[re.sub(r"^(\d+) MiB$", r"\1", cell) for cell in row] for row in rows]
    return parse_gpus("\n".join(", ".join(row) for row in plain))


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """(GPU index, GPU index) -> kind of path, such as NV2, PHB or SYS. UserError: no matrix of GPUs in it."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    # the head only names columns; a row has its name and then kinds of paths
    head = next((cells for cells in map(str.split, lines) if cells[:1] == ["GPU0"] and "X" not in cells), None)
    columns = [int(cell[3:]) for cell in head or () if re.fullmatch(r"GPU\d+", cell)]
    kinds: dict[tuple[int, int], str] = {}
    for line in lines:
        cells = line.split()
        if not cells or cells == head or not re.fullmatch(r"GPU\d+", cells[0]):
            continue
        for column, kind in zip(columns, cells[1:], strict=False):
            if kind != "X":
                kinds[int(cells[0][3:]), column] = kind
    if not columns:
        raise UserError("the topology file holds no matrix of GPUs; save the answer of `nvidia-smi topo -m`")
    return kinds


def build_links(gpus: list[Gpu], kinds: dict[tuple[int, int], str], host: str) -> dict[str, Any]:
    """`links` of a cluster entry: the most common kind inside the host, and all others as pairs of `host:slot`."""
    slots = {gpu.index: slot for slot, gpu in enumerate(gpus)}
    rates = {(slots[a], slots[b]): _look_up_rate(kind) for (a, b), kind in kinds.items() if a in slots and b in slots}
    usual = max(set(rates.values()), key=list(rates.values()).count) if rates else PATHS["PHB"]
    return {
        "intra_host": _link(usual),
        "inter_host": {"latency_seconds": 5.0e-5, "bandwidth_bytes_per_second": 1.1e10},
        "pairs": [
            {"source": f"{host}:{a}", "target": f"{host}:{b}", **_link(rate)}
            for (a, b), rate in sorted(rates.items())
            if rate != usual
        ],
        "source": SOURCE,
    }


def _look_up_rate(kind: str) -> float:
    if match := re.fullmatch(r"NV(\d+)", kind):
        return int(match[1]) * NVLINK_BYTES_PER_SECOND * IN_USE
    if kind not in PATHS:
        raise UserError(f"the topology file names a path {kind!r}; known are NV1, NV2, ... and {', '.join(PATHS)}")
    return PATHS[kind]


def _link(rate: float) -> dict[str, float]:
    return {"latency_seconds": LINK_LATENCY_SECONDS, "bandwidth_bytes_per_second": rate}
