"""Memory before loading, the rendezvous's address, and devices that are gone."""

import os
import socket
from types import SimpleNamespace

import pytest

from ds_llmpq.engine import preflight
from ds_llmpq.engine.preflight import check_free, check_memory
from ds_llmpq.errors import UserError
from ds_llmpq.launch import hosts
from ds_llmpq.launch.rendezvous import listen
from ds_llmpq.plan import (
    Deployment,
    MicroBatches,
    Plan,
    PredictedTotals,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
)

GIB = 1 << 30


def plan_of(*contexts, kind="cpu"):
    """(host, slot, GiB needed) of each stage."""
    stages = [
        Stage(
            rank, host, f"{host}:{slot}", kind, (rank, rank + 1), (16,), None,
            StageMemory(need * GIB, 0, 0, 0, 0), 0.0, 0.0, 0.0, kind=kind, slot=slot,
        )
        for rank, (host, slot, need) in enumerate(contexts)
    ]  # fmt: skip
    totals, solver = PredictedTotals(0.0, 0.0, 0.0, 0.0, 0.0), SolverReport("hand", 0.0, None, None, 0.0, "checked")
    workload, sizes = Workload(1, 1, 1), MicroBatches(1, 1)
    return Plan(None, workload, tuple(stages), sizes, totals, solver, deployment=Deployment("float32"))


def test_stages_of_one_processor_share_its_memory():
    plan = plan_of(("a", 0, 3), ("a", 1, 3), ("b", 0, 1))
    check_free(plan, [7 * GIB, 7 * GIB, 1 * GIB])
    with pytest.raises(UserError, match=r"needs 6.00 GiB on host a, but 5.00 GiB are free"):
        check_free(plan, [7 * GIB, 5 * GIB, 9 * GIB])
    with pytest.raises(UserError, match="on host b"):
        check_free(plan, [7 * GIB, 7 * GIB, GIB // 2])


def test_each_gpu_has_its_own():
    plan = plan_of(("a", 0, 3), ("a", 1, 3), kind="cuda")
    check_free(plan, [4 * GIB, 4 * GIB])
    with pytest.raises(UserError, match="on a:1"):
        check_free(plan, [4 * GIB, 2 * GIB])


@pytest.mark.parametrize("wait", [0.0, 2.5])
def test_memory_of_those_who_just_died_is_waited_for(monkeypatch, wait):
    """Too little at first, enough at the third look, two seconds later."""
    clock, seen = [0.0], []
    free = iter([GIB, GIB, 4 * GIB, 4 * GIB])
    monkeypatch.setattr(preflight.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(preflight, "free_bytes", lambda device: next(free))
    data = SimpleNamespace(gather=lambda report: [report], broadcast=lambda word: seen.append(word) or word)
    context = SimpleNamespace(data=data, stage_index=0, device=None)
    if not wait:
        with pytest.raises(UserError, match=r"3\.00 GiB"):
            check_memory(plan_of(("a", 0, 3)), context, wait)
    else:
        check_memory(plan_of(("a", 0, 3)), context, wait)
        assert seen == [b"again", b"again", b"go"]


def test_the_store_listens_on_the_given_address_alone():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with listen("127.0.0.1", port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        with pytest.raises(UserError, match=r"engine\.master_port"):
            listen("127.0.0.1", port)
    assert listen("192.0.2.1", port) is None  # an address of no machine: behind translation, listen on all


def test_devices_of_hosts_and_drivers_that_do_not_answer_are_lost():
    plan = plan_of(("a", 0, 1), ("b", 0, 1), ("b", 2, 1), kind="cuda")
    asked = []

    def slots(host, kind):
        asked.append(host)
        return {"a": None, "b": {0, 1}}[host]

    assert hosts.find_lost_devices(plan, slots) == ["b:2"]
    assert asked == ["a", "b"]
    assert hosts.find_lost_devices(plan, lambda host, kind: set()) == ["a:0", "b:0", "b:2"]


def test_a_host_without_an_answer_has_no_slots(tmp_path, monkeypatch):
    """A stand-in for ssh shows what is asked, too: no shell, no option by a host's name."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit 255\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert hosts.find_slots("nodeB", "cuda") == set()
    assert "-- nodeB nvidia-smi" in (tmp_path / "asked").read_text()
    assert hosts.find_slots("localhost", "cpu") is None
