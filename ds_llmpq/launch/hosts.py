"""Asks hosts over ssh: what they detect, and which of a plan's devices are there at the moment.

Imports no torch. ssh never asks for a password (`BatchMode`); every word for a remote shell is quoted.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.files import parse_json
from ds_llmpq.launch.launcher import is_local
from ds_llmpq.plan import Plan, placements

_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 20.0
_LIST_GPUS = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
_NO_SUCH_PROGRAM = 127
_SSH_FAILED = 255
_MOST_AT_ONCE = 64


def ask_hosts(questions: Mapping[str, Sequence[str]], seconds: float) -> list[Any]:
    """The JSON that each host's Python prints when started with these arguments; all hosts are asked at the same time.
    `UserError`: names every host that gave no answer."""
    with ThreadPoolExecutor(min(len(questions), _MOST_AT_ONCE)) as pool:
        asked = {host: pool.submit(_ask, host, arguments, seconds) for host, arguments in questions.items()}
    if wrong := [f"{host}: {future.exception()}" for host, future in asked.items() if future.exception()]:
        raise UserError(
            f"{len(wrong)} of {len(asked)} hosts gave no answer ({'; '.join(wrong)}). Each needs ssh without a "
            f"password and this installation at {sys.executable}."
        )
    return [future.result() for future in asked.values()]


def _ask(host: str, arguments: Sequence[str], seconds: float) -> Any:
    """`UserError`: a short reason."""
    path = os.environ.get("PYTHONPATH")  # which DeepSpeed passes to the ranks too
    try:
        answer = _run(host, [*(["env", f"PYTHONPATH={path}"] if path else []), sys.executable, *arguments], seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"nothing within {seconds:g} s") from None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be started ({error.strerror})") from None
    if answer.returncode == 0:  # a login may print lines of its own before the answer
        return parse_json(answer.stdout.strip().rpartition("\n")[2], "what it printed", "install this version there")
    said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1].removeprefix("error: ")
    said = make_printable(said, 300)
    raise UserError(f"ssh cannot reach it ({said})" if answer.returncode == _SSH_FAILED else said)


def _run(host: str, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs a command here, or on another host over ssh."""
    if not is_local(host):
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
        command = ["ssh", *options, "--", host, shlex.join(command)]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, timeout=seconds, check=False, **streams)


def find_lost_devices(plan: Plan, slots_of: Callable[[str, str], set[int] | None] | None = None) -> list[str]:
    """The plan's devices (`host:slot`) that are gone: the host does not answer over ssh, or its driver no longer lists
    the GPU. `slots_of(host, kind)` gives the available slots; None: unknown, so none counts as lost."""
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
    """Usable slots of a host; empty if it cannot be reached, None if it can but they are unknown."""
    asked = _LIST_GPUS if kind == "cuda" else ["true"]
    try:
        answer = _run(host, asked, _ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return set()
    except OSError:  # no such program here: nothing is known
        return None
    if answer.returncode == _SSH_FAILED and not is_local(host):
        return set()
    if kind != "cuda" or answer.returncode == _NO_SUCH_PROGRAM:
        return None
    return {int(line) for line in answer.stdout.split() if line.isdigit()}
