"""Starting the real `deepspeed` launcher as a child process and following it. Imports no torch.

The child runs in a session of its own: DeepSpeed's multi-host runner answers Ctrl-C with `pkill -f` on every host, so
the user's Ctrl-C must not reach it. To stop, the driver's process is told; its end ends all others.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_llmpq.errors import UserError

# carried to every host, beside what the cluster's configuration adds
_CARRIED = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_.,:/+=@%-]*")
_SAFE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Launch:
    """How to start a plan: `kind` cpu or cuda; `env` goes to every host."""

    hostfile: Path
    include: str
    hosts: tuple[str, ...]
    kind: str
    env: Mapping[str, str]
    folder: Path  # for the launcher's log and its environment file
    master_port: int | None = None

    @property
    def local(self) -> bool:
        """All stages on this machine: no ssh is needed."""
        return len(self.hosts) == 1 and is_local(self.hosts[0])


def is_local(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def command(launch: Launch, arguments: list[str]) -> list[str]:
    """The launcher's command line; `arguments` are those of `serve`."""
    port = launch.master_port or free_port()
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(launch.hostfile)]
    line += ["--include", launch.include, "--master_port", str(port), "--log_level", "warning"]
    if launch.local:
        line += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    elif len(launch.hosts) == 1:
        line += ["--force_multi"]
    return [*line, "--module", "ds_llmpq.verbs.serve", *arguments]


def environment(launch: Launch) -> dict[str, str]:
    """Variables for every rank. `UserError` for one that a remote shell could misread."""
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    own = {"DS_ACCELERATOR": launch.kind, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    if launch.local:
        # a rendezvous of one machine is nobody else's business
        own |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    env = {"OMP_NUM_THREADS": "1", **own, **carried, **launch.env}
    for name, value in env.items():
        if not _SAFE_NAME.fullmatch(name) or not _SAFE_VALUE.fullmatch(value):
            raise UserError(f"Environment variable {name}={value!r} holds characters a shell could read; change it.")
    return env


def run(launch: Launch, arguments: list[str], on_line: Callable[[str], None]) -> int:
    """Runs the launcher to its end, every line of its output going to `launcher.log` and to `on_line`.

    Returns its exit code. KeyboardInterrupt passes on after the ranks have been stopped.
    """
    env = environment(launch)
    env_file = launch.folder / "deepspeed_env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    full = os.environ | env | {"DS_ENV_FILE": str(env_file), "PYTHONPATH": os.pathsep.join(paths)}
    with open(launch.folder / "launcher.log", "wb") as log:
        child = subprocess.Popen(
            command(launch, arguments),
            env=full,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for line in child.stdout:
                log.write(line)
                log.flush()
                on_line(line.decode(errors="replace").rstrip("\n"))
            return child.wait()
        except BaseException:
            _stop(child)
            raise


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _stop(child: subprocess.Popen) -> None:
    """Ends the local processes; those on other hosts end when their connections close."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()
