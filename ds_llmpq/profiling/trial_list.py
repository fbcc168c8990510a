"""The trials that calibrate a cluster: which devices are timed together, and at which points. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ds_llmpq.cluster.cluster import Cluster, list_feasible_bits
from ds_llmpq.cluster.devices import Device
from ds_llmpq.cost.profile import Point
from ds_llmpq.profiling.contention import count_layers
from ds_llmpq.profiling.points import TimingTask, fill_up, plan_points
from ds_llmpq.profiling.trial_process import STAGES

POINT_SECONDS = {"cpu": 1.8, "cuda": 10.0}  # for the points of a device; the trial pipeline comes on top
LATE_SECONDS = {"cpu": 12.0, "cuda": 30.0}  # by the clock on the wall, which other programs may make run far ahead
# Layers timed in turn. Two of a small model's stay in the caches, where decode is a quarter faster. On several
# threads a graph's call of 64 tokens or more takes milliseconds beside its layers: of four each seems 1.25 to 1.45
# times as long as of twelve, and of those as long as in runs.
_CHAINED_LAYERS, _CHAINED_ON_THREADS = 4, 12


def group_for_trials(cluster: Cluster) -> dict[str, list[list[Device]]]:
    """By host, devices to time at the same moment: of one kind and number of threads, at most three. Every type is in a
    group of the first host that has it; more devices of a type only fill one up."""
    by_process: dict[tuple[str, str, int], list[Device]] = {}
    seen: dict[str, str] = {}
    for device in cluster.devices:
        if seen.setdefault(device.type.name, device.host) == device.host:
            by_process.setdefault((device.host, device.type.kind, device.threads or 1), []).append(device)
    groups: dict[str, list[list[Device]]] = {}
    for (host, *_), devices in by_process.items():
        types = list({device.type.name: device for device in devices}.values())
        listed = groups.setdefault(host, [])
        listed += [types[start : start + len(STAGES)] for start in range(0, len(types), len(STAGES))]
        others = [device for device in devices if device not in types]
        listed[-1] += others[: len(STAGES) - len(listed[-1])]
    return groups


def build_trial(wanted: TimingTask, devices: list[Device], ranks: int, links: bool) -> dict[str, Any]:
    """For `time_on_hosts`."""
    sizes = fill_up({size for listed in wanted.sizes.values() for size in _thin(listed)})
    workload = wanted.workload
    spec = {
        "kind": devices[0].type.kind,
        "threads": devices[0].threads or 1,
        "links": links,
        "path": wanted.path,
        "dtype": wanted.dtype,
        "sizes": sizes,
        "prompt_tokens": workload.prompt_tokens,
        "layers": count_layers(wanted, devices, ranks),
        "rounds": 3,
        "points": {
            "devices": [
                {
                    "slot": device.slot,
                    "cpu_share": device.cpu_share or 1.0,
                    "points": [asdict(point) for point in _list_points(wanted, device)],
                }
                for device in devices
            ],
            "quant": asdict(wanted.quant),
            "rows": sizes[-1],
            "capacity": workload.prompt_tokens + workload.generated_tokens,
            "chained": count_chained(devices[0]),
            "captured": wanted.captured,
            "seconds": POINT_SECONDS[devices[0].type.kind],
            "late_seconds": LATE_SECONDS[devices[0].type.kind],
        },
    }
    return {"spec": spec, "ranks": ranks}


def count_chained(device: Device) -> int:
    return _CHAINED_ON_THREADS if (device.threads or 1) > 1 else _CHAINED_LAYERS


def _list_points(wanted: TimingTask, device: Device) -> list[Point]:
    """Every micro-batch at the workload's own length, three of each phase at a second one, and the smallest at three:
    enough for a fit. Light points come first: where time runs out, heavy ones are left out."""
    bits = [width for width in wanted.bits if width in list_feasible_bits(device.type, wanted.dtype)]
    groups = plan_points(device.type.name, bits, wanted.sizes, wanted.workload)
    thinned = {phase: _thin(listed) for phase, listed in wanted.sizes.items()}
    smallest = min(min(listed) for listed in thinned.values())
    points = [
        point
        for rank, group in enumerate(groups)
        for point in group
        if rank == 0 or point.batch == smallest or (rank == 1 and point.batch in thinned[point.phase])
        if rank < 2 or point.phase == "prefill" or point.length_tokens != wanted.workload.prompt_tokens
    ]
    return sorted(points, key=lambda point: point.tokens)


def _thin(sizes: Iterable[int]) -> list[int]:
    """The smallest, the middle and the largest."""
    listed = sorted(sizes)
    return sorted({listed[0], listed[len(listed) // 2], listed[-1]})
