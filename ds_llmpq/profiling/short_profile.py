"""A short profile that `plan` and `run` make by themselves, kept in the user's cache folder.

The points are few: at most three micro-batches a phase, of two lengths. The ranks of a trial pipeline on each host
time them at the same moment, one rank a device, so that what stages take from one another is in the figures; on CPUs a
few of them by one rank alone too. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.detect import processor_name
from ds_llmpq.cluster.devices import COMPUTE_DTYPES
from ds_llmpq.cluster.rates import CALIBRATE
from ds_llmpq.cost.fit import fit_profile
from ds_llmpq.cost.linktable import read_links, write_links
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.cost.profile import Point, Profile, Sample, append, read_profile, write_header
from ds_llmpq.errors import UserError
from ds_llmpq.files import cache_folder, one_at_a_time
from ds_llmpq.launch.launcher import is_local
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.profiling.contention import count_ranks, is_contended, list_contention
from ds_llmpq.profiling.host_trials import KEPT, Advance, HostState, describe_hosts, time_on_hosts
from ds_llmpq.profiling.points import TimingTask, limit_chain
from ds_llmpq.profiling.trial_list import build_trial, count_chained, group_for_trials
from ds_llmpq.profiling.trial_process import STAGES, build_pass_sample, list_messages
from ds_llmpq.quant.kernels.registry import find_stage_kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, make_groups
from ds_llmpq.wording import format_percent

CHOICES = ("auto", "always", "never")
VERSION = 9  # of what is measured; what an older one kept is measured anew
_SHORTEST_PROMPT = 16  # a quarter and a sixteenth of it are timed too, which is enough for a fit
_LOOSE = 0.3  # off at left-out points, on average, beyond which times say little
_BUSY = 1.5  # times as long as it works, beyond which other programs had the processors
_MEMORY_SHARE = 0.5  # of what is available, for all ranks together
Show = Callable[[str], None]


def find_obstacle(wanted: TimingTask, cluster: Cluster, hosts: Mapping[str, HostState]) -> str | None:
    """Why the cluster cannot be measured, or None."""
    for name, host in hosts.items():
        for library, version in wanted.setup.libraries.items():
            if host.libraries.get(library) != version:
                return f"{name} has {library} {host.libraries.get(library)}, but {library} {version} is in use here"
    for device in cluster.devices:
        if device.type.kind == "cuda":
            types = hosts[device.host].gpu_types
            if device.slot >= len(types):
                return f"there is no GPU {device.name}"
            if types[device.slot] not in (None, device.type.name):
                return f"{device.name} is a {types[device.slot]}, not a {device.type.name}"
    return _find_shortage(wanted, cluster, hosts)


def calibrate(
    wanted: TimingTask,
    cluster: Cluster,
    choice: str,
    show: Show,
    advance: Advance = lambda done, total: None,
) -> Path | None:
    """The folder with the profile, measured now or before; None where there is none to be had. `choice` is
    `planner.calibrate`; `show` takes sentences, `advance` how far timing is. `UserError`: a choice that is not known,
    or `always` where nothing can be measured."""
    if choice == "auto":
        choice = os.environ.get(CALIBRATE, "auto")
    if choice not in CHOICES:
        raise UserError(f"planner.calibrate is {choice!r} but must be one of {', '.join(CHOICES)}.")
    if choice == "never":
        return None
    wanted = _round_sizes(wanted)
    parent = cache_folder() / KEPT
    try:
        hosts = describe_hosts((device.host for device in cluster.devices), wanted.setup.libraries)
        if obstacle := find_obstacle(wanted, cluster, hosts):
            raise UserError(obstacle)
        folder = parent / _key(wanted, cluster, hosts)
        if choice != "always" and _is_kept(folder):
            if doubt := _describe_doubt(read_profile(folder / "profile.csv"), wanted.shape):
                show(f"times from {folder}{doubt}")
            return folder
        with one_at_a_time(parent, lambda: show("waiting for another command that times these devices")):
            if choice == "always" or not _is_kept(folder):  # another process may have been faster
                _measure_into(wanted, cluster, folder, show, advance)
    except (UserError, OSError) as error:  # a plan on a roofline is better than none
        why = str(error).rstrip(".") if isinstance(error, UserError) else _explain_unwritable(error, parent)
        if choice == "always":
            raise UserError(f"planner.calibrate=always cannot be: {why}.") from None
        show(f"layer times are not measured: {why}")
        return None
    return folder


def _explain_unwritable(error: OSError, kept: Path) -> str:
    return f"{error.filename or kept} cannot be used ({error.strerror}); name a folder for them in XDG_CACHE_HOME"


def _is_kept(folder: Path) -> bool:
    """Whether the folder holds a profile that can be read; a damaged one is measured again."""
    try:
        read_profile(folder / "profile.csv")
        if (folder / "links.csv").exists():
            read_links(folder / "links.csv")
    except UserError:
        return False
    return True


def _measure_into(wanted: TimingTask, cluster: Cluster, folder: Path, show: Show, advance: Advance) -> None:
    """Complete or not at all."""
    away = [host for host in group_for_trials(cluster) if not is_local(host)]
    where = f"on the devices of these hosts (over ssh: {', '.join(away)})" if away else "on these devices"
    show(f"timing layers {where}, once for this model and machine (planner.calibrate=never does without)")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        made = Path(name) / "made"
        made.mkdir()
        _measure(wanted, cluster, made, advance)
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    doubt = _describe_doubt(read_profile(folder / "profile.csv"), wanted.shape)
    show(f"timed in {time.monotonic() - begin:.1f} s, kept in {folder}{doubt}")


def _describe_doubt(profile: Profile, shape: ModelShape) -> str:
    """What a calibration says when it is made and whenever it is used; nothing if all went well."""
    slowed, model = profile.note.get("slowed"), fit_profile(profile, shape)
    kinds = {(fit.device_type, fit.phase) for fit in model.fits.values() if fit.part == "layer"}
    off = max((model.find_error(*kind) for kind in kinds), default=0.0)
    if isinstance(slowed, (int, float)) and slowed > _BUSY:
        why = f"the machine was busy: timing took {slowed:.1f} times as long as it worked"
    elif off > _LOOSE:
        why = f"times at points left out of their fit are off by {format_percent(off)} on average"
    else:
        return ""
    return f"; {why}, so the predicted times are unsure; planner.calibrate=always measures again"


def _round_sizes(wanted: TimingTask) -> TimingTask:
    """Lengths up to the next power of two, so that batches of about the same lengths share a calibration."""
    prompt = max(_SHORTEST_PROMPT, _next_power(wanted.workload.prompt_tokens))
    generated = _next_power(wanted.workload.generated_tokens)
    workload = wanted.workload
    if prompt + generated <= (wanted.shape.max_positions or math.inf):
        workload = replace(workload, prompt_tokens=prompt, generated_tokens=generated)
    return replace(wanted, workload=workload)


def _next_power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _key(wanted: TimingTask, cluster: Cluster, hosts: Mapping[str, HostState]) -> str:
    """A name for all that the times depend on."""
    what: dict[str, Any] = {
        "version": VERSION,
        "setup": asdict(wanted.setup),
        "bits": wanted.bits,
        "captured": wanted.captured,
        "sizes": wanted.sizes,
        "lengths": [wanted.workload.prompt_tokens, wanted.workload.generated_tokens],
        "devices": [
            [device.name, device.type.name, device.type.kind, device.threads, device.cpu_share]
            for device in cluster.devices
        ],
        "hardware": {name: [host.processor, host.cores, *host.gpus] for name, host in hosts.items()},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _find_shortage(wanted: TimingTask, cluster: Cluster, hosts: Mapping[str, HostState]) -> str | None:
    """Which host's memory does not hold what is timed, or None."""
    on_cpus = {device.host for device in cluster.devices if device.type.kind == "cpu"}
    if not on_cpus:
        return None
    memory = MemoryModel(
        wanted.shape, make_groups(wanted.quant), COMPUTE_DTYPES[wanted.dtype], find_stage_kernel(wanted.quant.kernel)
    )
    chained = min(max(map(count_chained, cluster.devices)), wanted.shape.layers)
    chained = limit_chain(chained, memory.layer_bytes(UNQUANTIZED_BITS))
    rank = chained * sum(memory.layer_bytes(bits) for bits in wanted.bits)
    rows, workload = {phase: max(sizes) for phase, sizes in wanted.sizes.items()}, wanted.workload
    cache = memory.kv_bytes_per_sequence_layer(workload.prompt_tokens + workload.generated_tokens)
    rank += chained * max(rows.values()) * cache
    rank += memory.workspace_bytes(rows["prefill"], workload.prompt_tokens, 0, True)
    needed = (rank + memory.embed_bytes() + memory.head_bytes()) * len(STAGES)
    least = min(on_cpus, key=lambda name: hosts[name].available_bytes)
    available = hosts[least].available_bytes
    if needed <= _MEMORY_SHARE * available:
        return None
    return f"it would take {needed >> 20} MiB, more than half of the {available >> 20} MiB that are free on {least}"


def _measure(wanted: TimingTask, cluster: Cluster, out: Path, advance: Advance) -> None:
    """profile.csv and links.csv, from one trial for devices of a host that are started alike and three at a time. The
    note has how many times as long as it worked the most disturbed rank took."""
    groups = group_for_trials(cluster)
    trials = {
        host: [
            build_trial(wanted, devices, count_ranks(devices, cluster), links=devices is listed[0])
            for devices in listed
        ]
        for host, listed in groups.items()
    }
    samples, messages, contended, slowed = [], [], [], 1.0
    for host, answers in time_on_hosts(trials, advance).items():
        names = [device.name for device in cluster.devices if device.host == host]
        for devices, trial, found in zip(groups[host], trials[host], answers, strict=True):
            messages += list_messages(names, found["links"])
            for device in {device.type.name: device for device in devices}.values():
                samples += [build_pass_sample(device.type, entry) for entry in found["passes"]]
            samples += [Sample(Point(**entry.pop("point")), **entry) for entry in found["samples"]]
            slowed = max(slowed, *(passed / max(own, 1e-3) for passed, own in found["took"]))
            if is_contended(wanted, devices, trial["ranks"]):
                contended.append((found, trial["spec"]["layers"], devices))
    for entry in contended:
        samples += list_contention(*entry, Profile(wanted.setup, tuple(samples)), wanted.shape)
    if messages:
        write_links(out / "links.csv", messages)
    note = {"made_by": "calibration", "processor": processor_name(), "cores": os.cpu_count(), "slowed": slowed}
    write_header(out / "profile.csv", wanted.setup, note)
    append(out / "profile.csv", samples)
