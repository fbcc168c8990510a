"""DeepSpeed's hostfile (`host slots=N`) and its --include string, written for a plan and checked against one.

A placement is the (host, slot) of one pipeline stage; lists of placements are in pipeline order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_text

Placement = tuple[str, int]
# what ssh, pdsh and DeepSpeed's --include take for one host, and nobody for an option
HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LINE = re.compile(r"(\S+)\s+slots=(\d{1,9})")


def group_slots(placements: Iterable[Placement]) -> dict[str, list[int]]:
    """Hosts by first appearance, each with its slots ascending: the order in which DeepSpeed numbers ranks."""
    slots: dict[str, list[int]] = {}
    for host, slot in placements:
        check_host_name(host)
        if slot in slots.setdefault(host, []):
            raise UserError(f"device {host}:{slot} holds two stages; a device can hold one")
        slots[host].append(slot)
    return {host: sorted(used) for host, used in slots.items()}


def check_host_name(host: str) -> None:
    """`UserError` for a name that a program could mistake for something other than a host."""
    if not HOST_NAME.fullmatch(host):
        raise UserError(
            f"host name {host[:60]!r} is not usable; use letters, digits, '.', '_' and '-', not '-' or '.' first"
        )


def format_hostfile(placements: Iterable[Placement]) -> str:
    """One line per host, with just enough slots for the highest one in use."""
    return "".join(f"{host} slots={slots[-1] + 1}\n" for host, slots in group_slots(placements).items())


def write_hostfile(path: str | Path, placements: Iterable[Placement]) -> None:
    Path(path).write_text(format_hostfile(placements), encoding="utf-8")


def parse_hostfile(path: str | Path) -> dict[str, int]:
    """Host -> slots, in file order; `#` starts a comment. UserError: unreadable, a bad line, a repeated host, no
    hosts."""
    lines = read_text(path, "hostfile", "give a text file of lines 'host slots=N'").splitlines()
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.split("#", 1)[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise UserError(f"hostfile {path} line {number} is {line.strip()!r}; it must read 'host slots=N'")
        host, slots = match[1], int(match[2])
        check_host_name(host)
        if host in hosts:
            raise UserError(f"hostfile {path} line {number} lists host {host} again; list each host once")
        if slots < 1:
            raise UserError(f"hostfile {path} line {number} gives {host} {slots} slots; it must be at least 1")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"hostfile {path} lists no host; add lines 'host slots=N'")
    return hosts


def format_include(placements: Iterable[Placement]) -> str:
    """DeepSpeed's --include, e.g. `host:0,2@host2:1`: exactly the plan's devices."""
    return "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in group_slots(placements).items())


def order_ranks(placements: Sequence[Placement]) -> tuple[int, ...]:
    """Global rank that DeepSpeed gives to the process of each stage, for `format_hostfile` with `format_include`.

    DeepSpeed numbers ranks host by host, and within a host by slot. So a pipeline that returns to a host (A, B, A), or
    uses slot 1 before slot 0, is not in rank order.
    """
    order = [(host, slot) for host, slots in group_slots(placements).items() for slot in slots]
    return tuple(order.index(placement) for placement in placements)


def find_hostfile_disagreements(hostfile: Mapping[str, int], placements: Iterable[Placement]) -> list[str]:
    """Reasons why a plan cannot be launched with this hostfile (host -> slots), a sentence each; empty if it can."""
    found = []
    for host, slots in group_slots(placements).items():
        if host not in hostfile:
            found.append(f"the plan uses host {host}, which the hostfile lacks (it has {', '.join(hostfile)})")
        elif slots[-1] >= hostfile[host]:
            found.append(f"the plan uses slot {slots[-1]} of host {host}, which has slots=0..{hostfile[host] - 1}")
    return found
