"""Starts a trial pipeline (`trial.py`) on this host and returns what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.launch.environment import extend
from ds_llmpq.launch.launcher import find_free_port

_TIMEOUT_SECONDS = 240
RANKS = 3


def run_trial(spec: dict[str, Any], log: Path, ranks: int = RANKS) -> dict[str, Any]:
    """{"links": [...], "passes": [...], "samples": [...]} of `trial.main`; with less than three ranks no passes.
    `UserError`: a rank failed, with what it said last and the name of its log."""
    shared = extend(
        {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_port()),
            "DS_ACCELERATOR": spec["kind"],
            "OMP_NUM_THREADS": str(spec["threads"]),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    shared.pop("RANK", None)  # of a launcher that started this process: a trial without one forks its ranks
    line = [sys.executable, "-m", "ds_llmpq.profiling", json.dumps(spec)]
    # a GPU's runtime does not survive a fork; without one, the libraries are imported once for all ranks
    environments = [{}] if spec["kind"] == "cpu" else [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    children: list[subprocess.Popen] = []
    with log.open("wb") as errors:
        try:
            for own in environments:
                child = subprocess.Popen(
                    line, env=shared | own, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
                )
                children.append(child)
            output = children[0].communicate(timeout=_TIMEOUT_SECONDS)[0]
            codes = [child.wait(timeout=30) for child in children]
        except subprocess.TimeoutExpired:
            raise UserError(f"the trial pipeline did not end within {_TIMEOUT_SECONDS} s; see {log}") from None
        finally:
            for child in children:
                _kill_group(child)
    mark = "ds-llmpq trial "
    found = [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]
    if any(codes) or not found:
        raise UserError(f"the trial pipeline failed ({_last_line(log)}); see {log}")
    return json.loads(found[0])


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return make_printable(next((line.strip() for line in reversed(lines) if line.strip()), "without a word"), 200)


def _kill_group(child: subprocess.Popen) -> None:
    """The process and what it forked."""
    with suppress(ProcessLookupError, PermissionError):  # all of them have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
