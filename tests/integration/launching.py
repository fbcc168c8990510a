"""What the integration tests share: calling the command line, batch files, clusters, and looking for leftovers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import psutil
import yaml

from ds_llmpq import config

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# float32, so that greedy tokens do not depend on how rows are grouped; quantized without fine-tuning, which is slow
PRECISE = ("engine.dtype=float32", "quant.optimize=false", "quant.bits=[4,8,16]")
TEXT = "The quick brown fox jumps over the lazy dog while the planner counts layers, bytes and seconds. "
# MiB; they hold neither the whole model nor all of it unquantized, and differ
BUDGETS = (2.5, 4.7)
WORKLOAD = ("workload.sequences=4", "workload.prompt_tokens=64", "workload.generated_tokens=24")


@dataclass
class Command:
    """`ds-llmpq ARGUMENTS` in a process of its own; `mark` finds all processes that came of it on this machine."""

    arguments: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, output: int | IO = subprocess.PIPE) -> subprocess.Popen:
        line = [*self.prefix, sys.executable, "-m", "ds_llmpq", *self.arguments]
        return subprocess.Popen(line, cwd=ROOT, env=environment(self.mark), stdout=output, stderr=output, text=True)

    def run(self, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
        with self.start() as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _mark(process) == self.mark]


def run(*arguments: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    return Command(arguments).run(timeout)


def environment(mark: str = "") -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DS_LLMPQ_TEST": mark}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # the console scripts of the environment that runs the tests
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(paths), "PATH": path}


def write_cluster(path: Path, hosts: dict[str, list[int]], env: dict[str, str] | None = None) -> Path:
    """A cluster file of CPU devices: host -> memory of each device in MiB. All links are alike, whichever the hosts."""
    link = {"latency_seconds": 1e-4, "bandwidth_bytes_per_second": 1e9}
    cluster = {
        "name": "test",
        "device_types": {"cpu_core": asdict(config.read_device_types()["cpu_core"])},
        "hosts": [
            {
                "name": host,
                "devices": [
                    {"type": "cpu_core", "slot": slot, "memory_bytes": int(mib * MIB)}
                    for slot, mib in enumerate(budgets)
                ],
            }
            for host, budgets in hosts.items()
        ],
        "links": {"intra_host": link, "inter_host": link},
        "env": env or {},
    }
    path.write_text(yaml.safe_dump(cluster))
    return path


def write_rows(path: Path, rows: list[dict | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def completion(custom_id: str, prompt: str, max_tokens: int = 16) -> dict:
    body = {"model": "random", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def read_rows(path: Path) -> dict[str, dict]:
    """custom_id -> row; every id once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows), "a custom_id stands there twice"
    return found


def wait_for_results(file: Path, process: subprocess.Popen, timeout: float = 180.0) -> None:
    """Returns when the first row of a started run stands in its results."""
    end = time.monotonic() + timeout
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no result came"
        time.sleep(0.05)


def gone(processes, timeout: float = 30.0) -> bool:
    """Whether `processes()` is empty within so many seconds."""
    end = time.monotonic() + timeout
    while processes():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def error_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refused command: nothing else on standard error but progress, and no traceback."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stdout + result.stderr
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    return lines[0]


def _mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get("DS_LLMPQ_TEST")
    except psutil.Error:
        return None
