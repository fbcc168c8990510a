"""Which of a plan's devices are there at the moment. Imports no torch; nothing of a configuration passes a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from ds_llmpq.launch.launcher import is_local
from ds_llmpq.plan import Plan, placements

_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 20.0
_LIST_GPUS = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
_NO_SUCH_PROGRAM = 127
_SSH_FAILED = 255


def find_lost_devices(plan: Plan, slots_of: Callable[[str, str], set[int] | None] | None = None) -> list[str]:
    """Names (`host:slot`) of the plan's devices that are gone: their host does not answer over ssh, or its driver no
    longer lists the GPU. `slots_of(host, kind)`: the slots that are there; None: it cannot be said, so all count."""
    slots_of = slots_of or find_slots
    seen: dict[tuple[str, str], set[int] | None] = {}
    lost = []
    for stage, (host, slot) in zip(plan.stages, placements(plan), strict=True):
        kind = stage.kind
        if (host, kind) not in seen:
            seen[host, kind] = slots_of(host, kind)
        present = seen[host, kind]
        if present is not None and slot not in present:
            lost.append(stage.device)
    return lost


def find_slots(host: str, kind: str) -> set[int] | None:
    """Slots of a host that can be used now; empty if it cannot be reached, None where only that is known."""
    asked = _LIST_GPUS if kind == "cuda" else ["true"]
    if not is_local(host):
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
        asked = ["ssh", *options, "--", host, *asked]
    try:
        answer = subprocess.run(
            asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return set()
    except OSError:  # no such program here: nothing is known
        return None
    if answer.returncode == _SSH_FAILED and not is_local(host):
        return set()
    if kind != "cuda" or answer.returncode == _NO_SUCH_PROGRAM:
        return None
    return {int(line) for line in answer.stdout.split() if line.isdigit()}
