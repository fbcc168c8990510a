"""Times all parts of a model on this host's device types and writes profile.csv and links.csv as it goes."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ds_llmpq.cluster.cluster import Cluster, list_feasible_bits
from ds_llmpq.cluster.detect import processor_name
from ds_llmpq.cluster.devices import Device
from ds_llmpq.cost.linktable import write_links
from ds_llmpq.cost.profile import (
    Point,
    Sample,
    Setup,
    append,
    check_setup,
    read_profile,
    write_header,
)
from ds_llmpq.engine import device_memory
from ds_llmpq.engine.runner.capture import CudaGraphs
from ds_llmpq.errors import UserError
from ds_llmpq.launch.launcher import is_local
from ds_llmpq.profiling.contention import count_layers, count_ranks, is_contended, list_contention
from ds_llmpq.profiling.parts import Parts
from ds_llmpq.profiling.points import ProfilingTask, plan_points
from ds_llmpq.profiling.timer import PAUSE_SECONDS, NewSizes, Timer
from ds_llmpq.profiling.trial_process import STAGES, build_pass_sample, list_messages, run_trial

Show = Callable[[str, int, int, str], None]
_RESTLESS = 0.25  # spread of a point's repeats from which on it is timed once more


def list_local_types(cluster: Cluster) -> list[Device]:
    """One device of each type that this host has, under the cluster's name for this host. `UserError`: none."""
    local = [device for device in cluster.devices if is_local(device.host)]
    if not local:
        hosts = ", ".join(dict.fromkeys(device.host for device in cluster.devices))
        raise UserError(f"none of the cluster's hosts ({hosts}) is this one; run profile on each of them")
    return list({device.type.name: device for device in local}.values())


def profile(task: ProfilingTask, cluster: Cluster, out: Path, force: bool, show: Show) -> None:
    """Writes or continues `out`/profile.csv. `UserError`: it was begun with another setup and `force` is off."""
    file = out / "profile.csv"
    devices = list_local_types(cluster)
    done = _find_done(file, task.setup, force)
    if done is None:
        write_header(file, task.setup, _note(devices) | task.kernel_note | {"decode_graphs": task.captured})
        done = set()
    new_sizes = NewSizes()
    for device in devices:
        _profile_type(task, device, len(devices), file, done, new_sizes, show)
    if task.profiling.links:
        _run_trials(task, devices, cluster, out, done, show)


def _find_done(file: Path, setup: Setup, force: bool) -> set[tuple[Point, int]] | None:
    """Points and rounds already there; None for a fresh start."""
    if not file.is_file() or force:
        return None
    found = read_profile(file)
    check_setup(found.setup, setup, f"profile {file}", "give another out=DIR, or start over with force=true")
    text = file.read_text(encoding="utf-8")
    if not text.endswith("\n"):  # cut short in the middle of a row
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return {(sample.point, sample.round) for sample in found.samples}


def _profile_type(
    task: ProfilingTask,
    device: Device,
    types: int,
    file: Path,
    done: set[tuple[Point, int]],
    new_sizes: NewSizes,
    show: Show,
) -> None:
    kind = device.type
    bits = [width for width in task.bits if width in list_feasible_bits(kind, task.dtype)]
    groups = plan_points(kind.name, bits, task.sizes, task.workload)
    rounds = task.profiling.rounds
    todo = [(point, turn) for turn in range(rounds) for group in groups for point in group]
    left = [entry for entry in todo if entry not in done]
    if not left:
        return
    with open_timer(device) as timer:
        parts = _load_parts(task, bits, timer.device)
        parts.throttle(device.cpu_share or 1.0)
        _time_points(task, timer, parts, left, types, file, new_sizes, show)


@contextmanager
def open_timer(device: Device) -> Iterator[Timer]:
    """A timer on the device, with as many threads as its stage will have."""
    where = torch.device("cpu") if device.type.kind == "cpu" else torch.device("cuda", device.slot)
    threads = torch.get_num_threads()
    torch.set_num_threads(device.threads or 1)
    try:
        yield Timer(where, device.threads or 1, device.cpu_share or 1.0, PAUSE_SECONDS)
    finally:
        torch.set_num_threads(threads)


def _load_parts(task: ProfilingTask, bits: Sequence[int], where: torch.device) -> Parts:
    capacity = task.workload.prompt_tokens + task.workload.generated_tokens
    rows = max(*task.sizes["prefill"], *task.sizes["decode"])
    return Parts(
        task.path,
        task.shape,
        bits,
        task.quant,
        task.dtype,
        where,
        rows,
        capacity,
        task.profiling.chained_layers,
        capture=CudaGraphs(where) if task.captured and where.type == "cuda" else None,
    )


@torch.inference_mode()
def _time_points(
    task: ProfilingTask,
    timer: Timer,
    parts: Parts,
    left: list[tuple[Point, int]],
    types: int,
    file: Path,
    new_sizes: NewSizes,
    show: Show,
) -> None:
    """Every point once, then again in further rounds until the time is up."""
    begin, budget = time.perf_counter(), task.profiling.seconds / types
    name = left[0][0].device_type
    warm: set[Point] = set()
    for index, (point, turn) in enumerate(left):
        remaining = budget - (time.perf_counter() - begin)
        if remaining < 0 and turn > 0:
            show(f"profile {name}", len(left), len(left), f"time is up: {len(left) - index} repeats left out")
            return
        share = max(remaining, 0.0) / (len(left) - index)
        sample = _sample(timer, parts, point, turn, share, None if point in warm else new_sizes)
        warm.add(point)
        append(file, [sample])
        if len(warm) == index + 1 == len({point for point, _ in left}):
            append(file, new_sizes.samples(name, timer.cpu_share))
        show(f"profile {name}", index + 1, len(left), f"{point.part} {point.phase} {point.bits} bits")


def _sample(timer: Timer, parts: Parts, point: Point, turn: int, seconds: float, new_sizes: NewSizes | None) -> Sample:
    """With a warm-up where `new_sizes` is given, which learns from it."""
    action, times = parts.action(point)
    timing = timer.time(action, 0.7 * seconds, warm_up=int(new_sizes is not None))
    if new_sizes is not None:
        new_sizes.add(point, timing, timer.cpu_share)
    if timing.spread > _RESTLESS:
        again = timer.time(action, 0.3 * seconds, 0)
        timing = min(timing, again, key=lambda entry: entry.spread)
    return Sample(
        point,
        turn,
        timing.repeats,
        timing.undisturbed,
        timing.median_seconds / times,
        timing.minimum_seconds / times,
        timing.spread,
    )


def _run_trials(
    task: ProfilingTask,
    devices: Sequence[Device],
    cluster: Cluster,
    out: Path,
    done: set[tuple[Point, int]],
    show: Show,
) -> None:
    """One trial pipeline for each kind of process; types that differ in their share alone have it in common. It comes
    after the parts, for what contention is depends on their times.

    Sizes of both phases are thinned to three, for the overhead is close to linear in the rows.
    """
    sizes = sorted({*task.sizes["prefill"], *task.sizes["decode"]})
    sizes = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    by_process: dict[tuple[str, int], list[Device]] = {}
    for device in devices:
        by_process.setdefault((device.type.kind, device.threads or 1), []).append(device)
    for index, ((kind, threads), alike) in enumerate(by_process.items()):
        if all(any(point.device_type == d.type.name and point.part == "last" for point, _ in done) for d in alike):
            continue
        show("trial pipelines", index, len(by_process), "")
        if kind == "cuda" and torch.cuda.device_count() < 3:
            show("trial pipelines", index + 1, len(by_process), "left out: it needs three GPUs")
            continue
        together = [device for device in cluster.devices if _is_beside(device, kind, threads)][: len(STAGES)]
        ranks = count_ranks(together, cluster) if kind == "cpu" else len(STAGES)
        spec = {
            "kind": kind,
            "threads": threads,
            "layers": count_layers(task, together, ranks),
            "links": index == 0,
            "path": task.path,
            "dtype": task.dtype,
            "sizes": sizes,
            "prompt_tokens": task.workload.prompt_tokens,
            "rounds": task.profiling.rounds,
        }
        try:
            found = run_trial(spec, out / "trial.log", ranks)
        except UserError as error:
            raise UserError(f"{error}, or profile without it: profiling.links=false") from None
        if index == 0:
            names = [device.name for device in cluster.devices if is_local(device.host)]
            write_links(out / "links.csv", list_messages(names, found["links"]))
        for device in alike:
            append(out / "profile.csv", [build_pass_sample(device.type, entry) for entry in found["passes"]])
        if is_contended(task, together, ranks):
            timed = read_profile(out / "profile.csv")
            append(out / "profile.csv", list_contention(found, spec["layers"], together, timed, task.shape))
        show("trial pipelines", index + 1, len(by_process), "")


def _is_beside(device: Device, kind: str, threads: int) -> bool:
    return is_local(device.host) and (device.type.kind, device.threads or 1) == (kind, threads)


def _note(devices: Sequence[Device]) -> dict[str, Any]:
    """Where and when: for people, and the memory a process holds before it loads anything."""
    note: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "types": {
            device.type.name: {"kind": device.type.kind, "threads": device.threads, "cpu_share": device.cpu_share}
            for device in devices
        },
        "context_bytes": {},
    }
    for kind in {device.type.kind for device in devices}:
        note["context_bytes"][kind] = _context_bytes(kind)
    if torch.cuda.is_available():
        note["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        note["cuda"] = torch.version.cuda
    return note


def _context_bytes(kind: str) -> int:
    """CPU: resident memory of this process after its imports, which are those of a stage. GPU: what the first
    allocation takes beside what the allocator says."""
    if kind == "cpu":
        return device_memory.used_bytes(torch.device("cpu"))
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
