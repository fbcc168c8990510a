"""What each host of a cluster has, and trials on it: here, or on other hosts over ssh, all of them at the same time.

    python -m ds_llmpq.profiling.host_trials has LIBRARY ...    (on a host that is asked; prints JSON)
    python -m ds_llmpq.profiling.host_trials time TRIALS

Imports no torch.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.cluster.detect import (
    available_memory_bytes,
    count_usable_cores,
    find_type,
    processor_name,
    query_gpus,
)
from ds_llmpq.cost.profile import find_version
from ds_llmpq.errors import UserError
from ds_llmpq.files import cache_folder, one_at_a_time, parse_json
from ds_llmpq.launch.hosts import ask_hosts
from ds_llmpq.launch.launcher import is_local
from ds_llmpq.profiling.trial_process import Findings, run_trial
from ds_llmpq.shipped import conf_folder
from ds_llmpq.validation import Count, Label, Many, Table, validate

KEPT = "calibration"  # of the user's cache folder
_MODULE = "ds_llmpq.profiling.host_trials"
_DESCRIBE_SECONDS, _TIME_SECONDS = 30, 600
_REMEDY = "install this version there"

Advance = Callable[[int, int], None]  # points done, points in all


@dataclass(frozen=True)
class HostState:
    """What a host has that times depend on. `gpus`: name and driver of each; `gpu_types`: their types of conf/device by
    slot, None where none covers it."""

    processor: Label
    cores: Count
    available_bytes: Count
    gpus: Many[Label]
    gpu_types: Many[Label | None]
    libraries: Table[Label]


def describe_hosts(hosts: Iterable[str], libraries: Iterable[str]) -> dict[str, HostState]:
    """Each host by name, with its versions of these libraries. `UserError`: one gives no answer."""
    hosts = list(dict.fromkeys(hosts))
    away = [host for host in hosts if not is_local(host)]
    answers = ask_hosts({host: ["-m", _MODULE, "has", *libraries] for host in away}, _DESCRIBE_SECONDS) if away else []
    found = {
        host: validate(HostState, answer, f"what {host} printed", _REMEDY)
        for host, answer in zip(away, answers, strict=True)
    }
    return {host: found[host] if host in found else describe_host(libraries) for host in hosts}


def describe_host(libraries: Iterable[str]) -> HostState:
    """This one."""
    types = [find_type(gpu) for gpu in query_gpus()]
    known = [name if name and (conf_folder() / "device" / f"{name}.yaml").is_file() else None for name in types]
    versions = {name: find_version(name) for name in libraries}
    memory = available_memory_bytes()
    return HostState(processor_name(), count_usable_cores(), memory, _list_gpus(), tuple(known), versions)


def _list_gpus() -> tuple[str, ...]:
    """`name, driver` of each GPU of this host, as nvidia-smi says it; none without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(result.stdout.splitlines()) if result.returncode == 0 else ()


def time_on_hosts(
    trials: Mapping[str, Sequence[Mapping[str, Any]]], advance: Advance
) -> dict[str, list[dict[str, Any]]]:
    """What `run_trial` finds in each host's trials (`spec` and `ranks`), which run there one after another. Where all
    are here, `advance` is told how far they are. `UserError`: a trial failed, or a host gives no answer or another."""
    if all(map(is_local, trials)):
        return {host: _time_here(listed, advance) for host, listed in trials.items()}
    questions = {host: ["-m", _MODULE, "time", json.dumps(listed)] for host, listed in trials.items()}
    answers = dict(zip(trials, ask_hosts(questions, _TIME_SECONDS), strict=True))
    for host, answer in answers.items():
        found = validate(tuple[Findings, ...], answer, f"what {host} printed", _REMEDY)
        if len(found) != len(trials[host]):
            raise UserError(f"{host} ran {len(found)} trials of {len(trials[host])}; {_REMEDY}")
    return answers


def _time_here(trials: Sequence[Mapping[str, Any]], advance: Advance = lambda done, total: None) -> list[Any]:
    """The log of the last one stays in the cache folder, for it is wanted where nothing was kept."""
    folder = cache_folder() / KEPT
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cache_folder()):  # whoever asks
        return [run_trial(trial["spec"], _log(folder), trial["ranks"], advance) for trial in trials]


def _log(folder: Path) -> Path:
    """Of this host: homes may be shared."""
    return folder / f"trial.{socket.gethostname()}.log"


def _answer(question: str, arguments: Sequence[str]) -> Any:
    if question == "has":
        return asdict(describe_host(arguments))
    try:
        return _time_here(parse_json(arguments[0], "the list of trials", _REMEDY))
    except OSError as error:
        raise UserError(f"{error.filename or cache_folder()} cannot be used ({error.strerror})") from None


if __name__ == "__main__":  # on a host of a cluster
    try:
        print(json.dumps(_answer(sys.argv[1], sys.argv[2:])))
    except UserError as error:
        sys.exit(f"error: {error}")
