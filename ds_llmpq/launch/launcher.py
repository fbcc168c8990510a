"""Starts the `deepspeed` launcher as a child process, monitors it, and ends it. Imports no torch.

DeepSpeed's multi-host runner responds to Ctrl-C and SIGTERM with `pkill -f` on every host, which may kill other
people's processes. So the launcher runs in a separate session, which the user's Ctrl-C does not reach, and is ended by
SIGKILL. Every rank, on any host, ends as soon as nobody reads its output (`heartbeat.exit_if_parent_dies`).
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ds_llmpq.cluster.hostfile import format_include
from ds_llmpq.errors import UserError
from ds_llmpq.files import write_whole
from ds_llmpq.launch.environment import RUN_MARK, extend
from ds_llmpq.launch.process_monitor import Exit, MonitorOptions, kill_marked, monitor
from ds_llmpq.plan import Plan, launch_order

ENVIRONMENT_NAME = "deepspeed_env"
LOG_NAME = "launcher.log"
# passed on to every host, beside those that the cluster's configuration adds
_CARRIED = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)  # fmt: skip
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_.,:/+=@%-]*")
_MARK = re.compile(r"[0-9a-f]{32}")
_SAFE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Launch:
    """How to start a plan: `hosts` in rank order, `kind` cpu or cuda, `env` for every host."""

    hostfile: Path
    include: str
    hosts: tuple[str, ...]
    kind: str
    env: Mapping[str, str]
    folder: Path  # for the launcher's log and its environment file
    master_port: int | None = None

    @classmethod
    def from_plan(cls, plan: Plan, folder: Path, master_port: int | None = None) -> Launch:
        """A plan whose hostfile lies in `folder`."""
        return cls(
            hostfile=folder / "hostfile",
            include=format_include(launch_order(plan)),
            hosts=tuple(dict.fromkeys(host for host, _ in launch_order(plan))),
            kind=plan.stages[0].kind,
            env=plan.deployment.env,
            folder=folder,
            master_port=master_port,
        )

    @property
    def local(self) -> bool:
        """Whether all stages are on this machine, so that no ssh is needed."""
        return len(self.hosts) == 1 and is_local(self.hosts[0])


def is_local(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def build_options(launch: Launch) -> list[str]:
    """The launcher's own options."""
    line = ["--hostfile", str(launch.hostfile), "--include", launch.include]
    if launch.local:
        line += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        if "MASTER_ADDR" in launch.env:  # otherwise DeepSpeed asks the first host for its first address
            line += ["--master_addr", launch.env["MASTER_ADDR"]]
        if len(launch.hosts) == 1:
            line += ["--force_multi"]
    return line


def build_command(launch: Launch, arguments: list[str]) -> list[str]:
    """The launcher's command line; `arguments` are for `serve`."""
    port = launch.master_port or find_free_port()
    line = [sys.executable, "-m", "deepspeed.launcher.runner", *build_options(launch)]
    line += ["--master_port", str(port), "--log_level", "warning"]
    return [*line, "--module", "ds_llmpq.commands.serve", *arguments]


def format_manual_command(launch: Launch, arguments: list[str]) -> str:
    """A shell line that starts the same ranks without `run`; their variables are in the environment file."""
    variables = [f"DS_ACCELERATOR={launch.kind}"]
    if not launch.local:
        variables.append("DS_ENV_FILE=" + shlex.quote(str(launch.folder / ENVIRONMENT_NAME)))
    line = ["deepspeed", *build_options(launch), "--module", "ds_llmpq.commands.serve", *arguments]
    return " ".join([*variables, shlex.join(line)])


def build_environment(launch: Launch) -> dict[str, str]:
    """Variables for every rank. `UserError`: a remote shell could misread one."""
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    own = {"DS_ACCELERATOR": launch.kind, "TOKENIZERS_PARALLELISM": "false"}
    env = {"OMP_NUM_THREADS": "1", **own, **carried, **launch.env}
    for name, value in env.items():
        if not _SAFE_NAME.fullmatch(name) or not _SAFE_VALUE.fullmatch(value):
            raise UserError(f"Environment variable {name}={value!r} holds characters a shell could read; change it.")
    return env


def write_environment(launch: Launch, mark: str = "") -> Path:
    """Writes the file for DeepSpeed's `DS_ENV_FILE`, NAME=VALUE lines exported on every host; only its owner may read
    it."""
    file = launch.folder / ENVIRONMENT_NAME
    variables = build_environment(launch) | ({RUN_MARK: mark} if mark else {})
    write_whole(file, "".join(f"{name}={value}\n" for name, value in variables.items()), mode=0o600)
    return file


def run_launcher(launch: Launch, arguments: list[str], options: MonitorOptions, mark: str | None = None) -> Exit:
    """Runs the launcher until it ends; its output goes to `launcher.log` and `options.on_line`.

    When a rank has died, the others get a few seconds to report errors and are then ended. `mark` identifies the run in
    the environment of its processes. The last of `arguments` is the job, which is kept out of the log.
    """
    options = replace(options, hidden=arguments[-1])
    mark = mark or uuid.uuid4().hex
    file = write_environment(launch, mark)
    env = extend(build_environment(launch) | {"DS_ENV_FILE": str(file)})
    try:
        return monitor(build_command(launch, arguments), env, launch.folder / LOG_NAME, mark, options)
    except OSError as error:
        raise UserError(f"The launcher cannot be started ({error}); free what it needs and run again.") from None


def kill_leftovers(folder: Path) -> None:
    """Ends what a killed `run` left on this machine, such as stopped ranks, which would keep the results locked. The
    caller must have locked the folder."""
    try:
        lines = (folder / ENVIRONMENT_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for name, _, mark in (line.partition("=") for line in lines):
        if name == RUN_MARK and _MARK.fullmatch(mark):
            kill_marked(mark)


def find_free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
