"""Starts a trial pipeline (`trial.py`) on this host and returns what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.launch.launcher import find_free_port

_TIMEOUT_SECONDS = 240
RANKS = 3


def run_trial(spec: dict[str, Any], log: Path) -> dict[str, Any]:
    """{"links": [...], "passes": [...]} of `trial.main`. `UserError`: a rank failed, with its log's name."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = os.environ | {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
        "DS_ACCELERATOR": spec["kind"],
        "OMP_NUM_THREADS": str(spec["threads"]),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    children: list[subprocess.Popen] = []
    with log.open("wb") as errors:
        try:
            for rank in range(RANKS):
                env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                line = [sys.executable, "-m", "ds_llmpq.profiling.trial", json.dumps(spec)]
                child = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
                children.append(child)
            output = children[0].communicate(timeout=_TIMEOUT_SECONDS)[0]
            codes = [child.wait(timeout=30) for child in children]
        except subprocess.TimeoutExpired:
            raise UserError(f"the trial pipeline did not end within {_TIMEOUT_SECONDS} s; see {log}") from None
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
    mark = "ds-llmpq trial "
    found = [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]
    if any(codes) or not found:
        raise UserError(f"the trial pipeline failed; see {log}, or profile without it: profiling.links=false")
    return json.loads(found[0])
