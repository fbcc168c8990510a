"""Two hosts on one machine: each a network namespace of its own with a cable between them, and an sshd in each.

Every host also has its own process, mount and host-name namespaces: its /etc/hosts and ssh configuration are files of
the test, no file of the user is read or written, and when its first process ends, all its processes are gone and with
them its network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# interfaces are named differently on each host, as on real ones
_PLACES = (("nodeA", "10.77.13.1", "wan0"), ("nodeB", "10.77.13.2", "lan1"))
_TOOLS = {"ip": "iproute2", "pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client"}
_NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
_SSHD = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv XDG_CACHE_HOME={folder}/cache
"""
_SSH = """\
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  LogLevel ERROR
"""
# run as the first process of a host; then waits for a line, by when the cable is in place
_BOOT = """\
set -e
folder=$1; name=$2; sshd=$3
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
echo ready
read -r line
exec "$sshd" -D -e -f "$folder/sshd_config.$name"
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    interface: str
    process: int  # its first one, as this machine numbers it

    def inside(self) -> tuple[str, ...]:
        """What to put before a command line to run it on this host."""
        return ("nsenter", "--target", str(self.process), *_NAMESPACES, "--")

    def run(self, *line: str) -> str:
        return subprocess.run([*self.inside(), *line], check=True, capture_output=True, text=True, timeout=30).stdout

    def processes(self) -> list[psutil.Process]:
        """All that runs on this host, but for its first process and what serves ssh connections."""
        namespace = os.readlink(f"/proc/{self.process}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                same = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
                if same and process.name() != "sshd" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def reason_to_skip() -> str | None:
    """Why this machine cannot make such hosts, None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [package for tool, package in _TOOLS.items() if _tool(tool) is None]
    if missing:
        return f"the programs of {', '.join(missing)} are not installed"
    probe = subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"namespaces cannot be made here ({probe.stderr.strip()})"
    probe = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"],
        capture_output=True, text=True,
    )  # fmt: skip
    return f"virtual cables cannot be made here ({probe.stderr.strip()})" if probe.returncode else None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Hosts nodeA and nodeB that reach each other by name over ssh; `folder` takes their keys and configuration."""
    _write_configuration(folder)
    with contextlib.ExitStack() as stack:
        booting = [stack.enter_context(_booted(folder, name)) for name, _, _ in _PLACES]
        first = [psutil.Process(process.pid).children()[0].pid for process in booting]
        (_, _, interface), (_, _, other) = _PLACES
        _ip("link", "add", interface, "netns", first[0], "type", "veth", "peer", "name", other, "netns", first[1])
        hosts = [Host(*place, process) for place, process in zip(_PLACES, first, strict=True)]
        for host, process in zip(hosts, booting, strict=True):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            host.run("ip", "link", "set", host.interface, "up")
            process.stdin.write("go\n")
            process.stdin.flush()
        for host in hosts:
            _wait_for_ssh(hosts[0], host)
        yield hosts


@contextlib.contextmanager
def _booted(folder: Path, name: str) -> Iterator[subprocess.Popen]:
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            # killing unshare kills the host's first process, and that ends the whole namespace
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", _BOOT, "boot", str(folder), name, _tool("sshd")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {name} does not start: {(folder / f'{name}.log').read_text()}")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _write_configuration(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name},{address} {public}" for name, address, _ in _PLACES))
    names = "".join(f"{address} {name}\n" for name, address, _ in _PLACES)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    for name, address, _ in _PLACES:
        (folder / f"sshd_config.{name}").write_text(_SSHD.format(folder=folder, address=address))


def _wait_for_ssh(source: Host, target: Host) -> None:
    end = time.monotonic() + 120
    while True:
        asked = subprocess.run([*source.inside(), "ssh", target.name, "hostname"], capture_output=True, text=True)
        if asked.stdout.strip() == target.name:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"{target.name} does not answer over ssh: {asked.stdout}{asked.stderr}")
        time.sleep(0.2)


def _ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, timeout=30)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
