"""What the sections of `gpu.py` share: their time, the device, clocks, and results that are on disk as they come."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ds_llmpq.engine.runner.capture import CudaGraphs
from ds_llmpq.profiling.timer import Timer

LIBRARIES = (
    "torch", "transformers", "triton", "deepspeed", "hqq", "safetensors", "numpy", "humming-kernels",
    "openvino",
)  # fmt: skip


class Run:
    """One call of the script. Each result is a JSON line of `results.jsonl` at once, so whatever ends the run leaves
    what it had; `origin` says of a line's figures whether they were measured, fitted or are a datasheet's."""

    def __init__(self, out: Path, device: torch.device, tiny: bool, seconds: float, began: float | None = None):
        """`began`: when the process that this one goes on from did (`time.monotonic`)."""
        self.out, self.device, self.tiny = out, device, tiny
        self.began = began or time.monotonic()
        self.ends = self.section_ends = self.began + seconds
        self.dtype = torch.bfloat16
        self.lines: list[dict[str, Any]] = []
        self.rates: dict[str, float] = {}  # measured ceilings: bytes/s and FLOP/s
        self.context = None  # of the one rank, once the engine has been asked
        self._writer: int | None = None  # once the time is over, the one thread whose lines count
        self._section = ""
        out.mkdir(parents=True, exist_ok=True)
        results = out / "results.jsonl"
        if began is not None:
            self.lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
            self.rates = next((line["rates"] for line in self.lines if "rates" in line), {})
        self._file = results.open("w" if began is None else "a", encoding="utf-8")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_over(self) -> bool:
        """Whether nothing waits for the device any more."""
        return self._writer is not None

    def give_up(self) -> None:
        """From now on only this thread writes; what another one is still at is lost."""
        self._writer = threading.get_ident()

    def _is_given_up(self) -> bool:
        return self._writer not in (None, threading.get_ident())

    def add(self, what: str, origin: str = "measured", **figures: Any) -> None:
        if self._is_given_up():
            return
        at = round(time.monotonic() - self.began, 1)
        line = {"section": self._section, "what": what, "origin": origin, "at_seconds": at, **figures}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        shown = ", ".join(f"{name} {plain(value)}" for name, value in figures.items())
        print(f"[{at:6.1f} s] {self._section}: {what}: {shown}", flush=True)

    def check(self, what: str, ok: bool, **figures: Any) -> None:
        self.add(what, ok=bool(ok), **figures)

    @contextlib.contextmanager
    def section(self, name: str, share: float, seconds: float) -> Iterator[None]:
        """Up to `share` of the whole time; what it raises is a line, and the next section goes on."""
        if self.is_over:
            if not self._is_given_up():
                self._section = name
            yield
            return
        self._section = name
        self.section_ends = min(self.ends, time.monotonic() + share * seconds)
        try:
            yield
        except ModuleNotFoundError as error:
            self.add(f"left out: {error.name} cannot be imported here", "none")
        except (Exception, SystemExit) as error:
            self.add("failed", "none", error=f"{type(error).__name__}: {error}"[:500], ok=False)
        finally:
            gc.collect()  # engines are part of cycles, and hold a model and a cache
            free(self.device)

    def left(self) -> float:
        """Seconds of this section."""
        return self.section_ends - time.monotonic()

    def points(self, what: str, values: list) -> Iterator:
        """The values, until the section's time is over; then a line says how many were left out."""
        for place, value in enumerate(values):
            if self.left() <= 0:
                self.add(f"{what}: time is up", "none", left_out=[label(each) for each in values[place:]])
                return
            yield value

    def close(self) -> None:
        self._file.close()


def free(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # a device in error is said by what comes next
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def label(point: Any) -> str:
    """A point in words: a kernel by its name, several values side by side."""
    if isinstance(point, tuple):
        return " ".join(map(label, point))
    return str(getattr(point, "name", point))


def is_lost(device: torch.device) -> bool:
    """Whether the device is in an error that stays until the process ends."""
    if device.type == "cuda":
        try:
            torch.zeros(8, device=device).add_(1)
            torch.cuda.synchronize()
        except Exception:
            return True
    return False


def plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timed(run: Run, action: Callable[[], Any], seconds: float = 0.3, calls: int = 1) -> float:
    """Seconds of one call by the median of several runs: device events on a GPU. `calls`: that `action` makes."""
    return Timer(run.device).time(action, seconds, warm_up=2).median_seconds / calls


def timed_in_graph(run: Run, action: Callable[[], Any], calls: int = 20) -> float:
    """Seconds of one call where the host costs nothing: `calls` of them in one captured graph (on CPUs: called)."""

    def several() -> None:
        for _ in range(calls):
            action()

    if not run.on_gpu:
        return timed(run, action, 0.1)
    replay = CudaGraphs(run.device)(several, ())
    return timed(run, replay, 0.1, calls)


def environment(run: Run) -> dict[str, Any]:
    """Device, driver and versions, as the first line has them."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    found = {"python": platform.python_version(), "cores": os.cpu_count(), **versions}
    if run.on_gpu:
        properties = torch.cuda.get_device_properties(run.device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / (1 << 30), 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    else:
        found["device"] = "cpu"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def write_table(run: Run) -> str:
    """`table.md`: one table a section, of the lines' figures."""
    text = ["# scripts/bench/gpu.py", ""]
    for section in dict.fromkeys(line["section"] for line in run.lines):
        text += [f"## {section}", ""]
        lines = [line for line in run.lines if line["section"] == section]
        for columns in dict.fromkeys(_columns(line) for line in lines):
            text += ["| " + " | ".join(("what", *columns, "origin")) + " |", "|" + "-|" * (len(columns) + 2)]
            alike = [line for line in lines if _columns(line) == columns]
            for line in alike:
                cells = (line["what"], *(plain(line[name]) for name in columns), line["origin"])
                text.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |")
            text.append("")
    written = "\n".join(text)
    (run.out / "table.md").write_text(written, encoding="utf-8")
    return written


def _columns(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in line if name not in ("section", "what", "origin", "at_seconds"))
