"""Starts a trial pipeline (`trial.py`) on this host, and turns what it found into rows of profile.csv and links.csv.
Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.linktable import Message
from ds_llmpq.cost.profile import Part, Phase, Point, Sample
from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.launch.environment import extend
from ds_llmpq.launch.launcher import find_free_port
from ds_llmpq.launch.progress import parse_progress
from ds_llmpq.plan import (
    Deployment,
    MicroBatches,
    Plan,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
)
from ds_llmpq.validation import Count, Many, Positive, Seconds, Some, one_of

MARK = "ds-llmpq trial "
STAGES = ("first", "middle", "last")
DECODE_PASSES = 16  # of each group
_MOST_PROMPT_TOKENS = 4096  # of a micro-batch
_TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class _Messages:
    channel: one_of("activation", "token")
    bytes: Count
    seconds: Some[Seconds]  # ascending


@dataclass(frozen=True)
class _Overhead:
    part: Part
    phase: Phase
    batch: Positive
    length_tokens: Count
    round: Count
    seconds: Seconds


@dataclass(frozen=True)
class _Period:
    batch: Positive
    past: Count
    round: Count
    seconds: Seconds


@dataclass(frozen=True)
class Findings:
    """The form of what `run_trial` finds. `took`: by rank, seconds that passed and seconds of its own."""

    links: Many[_Messages]
    passes: Many[_Overhead]
    periods: Many[_Period]
    samples: Many[Sample]
    took: Some[tuple[Seconds, Seconds]]


def run_trial(
    spec: dict[str, Any],
    log: Path,
    ranks: int = len(STAGES),
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What `trial.main` finds, in the form of `Findings`; of one rank only the last two. `advance` is told how many of
    the points are timed.
    `UserError`: a rank failed, with what it said last and the name of its log."""
    slots = [device["slot"] for device in spec["points"]["devices"]] if "points" in spec else list(range(ranks))
    shared = extend(
        {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_port()),
            "DS_ACCELERATOR": spec["kind"],
            "OMP_NUM_THREADS": str(spec["threads"]),
        }
    )
    for name in ("RANK", "LOCAL_SIZE"):  # of a launcher that started this process
        shared.pop(name, None)
    line = [sys.executable, "-m", "ds_llmpq.profiling", json.dumps(spec | {"plan": _build_plan(spec, ranks).to_json()})]
    if spec["kind"] == "cpu":  # the libraries are imported once for all ranks: without RANK a trial forks them
        environments = [{}]
    else:  # a GPU's runtime does not survive a fork
        # slots are PCI order, as with the launcher, whatever this process sees; rank j takes the j-th
        shared |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slots)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        environments = [{"RANK": str(rank)} for rank in range(ranks)]
    children: list[subprocess.Popen] = []
    with log.open("wb") as errors, _exit_by_exception():
        try:
            for own in environments:
                child = subprocess.Popen(
                    line, env=shared | own, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
                )
                children.append(child)
            lines = _read_lines(children, advance)
            codes = [child.wait(timeout=30) for child in children]
        except subprocess.TimeoutExpired:
            raise UserError(f"the trial pipeline did not end within {_TIMEOUT_SECONDS} s; see {log}") from None
        finally:
            for child in children:
                _kill_group(child)
    found = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    if any(codes) or not found:
        raise UserError(f"the trial pipeline failed ({_read_last_line(log)}); see {log}")
    return json.loads(found[0])


def _read_lines(children: Sequence[subprocess.Popen], advance: Callable[[int, int], None]) -> list[str]:
    """What the first process prints until it ends, but for how far it is. `TimeoutExpired`: it takes too long."""
    late = threading.Event()

    def end_all() -> None:
        late.set()
        for child in children:
            _kill_group(child)

    timer = threading.Timer(_TIMEOUT_SECONDS, end_all)
    timer.start()
    lines = []
    try:
        for line in children[0].stdout:
            if report := parse_progress(line):
                advance(report.done, report.total)
            else:
                lines.append(line)
    finally:
        timer.cancel()
    if late.is_set():
        raise subprocess.TimeoutExpired(children[0].args, _TIMEOUT_SECONDS)
    return lines


@contextmanager
def _exit_by_exception() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end this process by an exception, so that its ranks end with it: they have a session of
    their own. Only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def name_place(stage: int, stages: int) -> str:
    return STAGES[0] if stage == 0 else STAGES[-1] if stage == stages - 1 else STAGES[1]


def cut_prompt(tokens: int, rows: int) -> int:
    """Prompt tokens of each of so many rows that a trial's micro-batch has."""
    return max(1, min(tokens, _MOST_PROMPT_TOKENS // rows))


def _build_plan(spec: dict[str, Any], ranks: int) -> Plan:
    """`spec["layers"]` (1) unquantized layers a stage; its workload is the trial's request group that needs the most
    cache."""
    workloads = [
        Workload(2 * rows, cut_prompt(spec["prompt_tokens"], rows), DECODE_PASSES + 2) for rows in spec["sizes"]
    ]
    largest = max(workloads, key=lambda one: one.sequences * (one.prompt_tokens + one.generated_tokens))
    threads = spec["threads"] if spec["kind"] == "cpu" else None
    layers = spec.get("layers", 1)
    stages = tuple(
        Stage(
            rank, "localhost", f"localhost:{rank}", spec["kind"], (rank * layers, (rank + 1) * layers), (16,) * layers,
            "dequantize", StageMemory(0, 0, 0, 0, 0), 0, 0, 0, kind=spec["kind"], slot=rank, threads=threads,
        )
        for rank in range(ranks)
    )  # fmt: skip
    return Plan(
        PlannedModel(spec["path"]), largest, stages, MicroBatches(1, 1), PredictedTotals(0, 0, 0, 0, 0),
        SolverReport("none", 0, None, None, 0, "checked"), quant=Quantization(), deployment=Deployment(spec["dtype"]),
    )  # fmt: skip


def _read_last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return make_printable(next((line.strip() for line in reversed(lines) if line.strip()), "without a word"), 200)


def _kill_group(child: subprocess.Popen) -> None:
    """The process and what it forked."""
    with suppress(ProcessLookupError, PermissionError):  # all of them have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def build_pass_sample(kind: DeviceType, entry: dict[str, Any]) -> Sample:
    point = Point(kind.name, entry["part"], entry["phase"], 0, entry["batch"], entry["length_tokens"])
    return Sample(point, entry["round"], 1, 1, entry["seconds"], entry["seconds"], 0.0)


def list_messages(names: Sequence[str], found: Iterable[dict[str, Any]]) -> list[Message]:
    """For every ordered pair of a host's devices: between processes of one host the link is the same."""
    pairs = [(a, b) for a in names for b in names if a != b] or [(names[0], names[0])]
    messages = []
    for source, target in pairs:
        for entry in found:
            times = entry["seconds"]
            middle = times[len(times) // 2]
            messages.append(Message(source, target, entry["channel"], entry["bytes"], len(times), middle, times[0]))
    return messages
