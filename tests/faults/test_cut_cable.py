"""The cable between two hosts is pulled in the middle of a run: for half a minute, or for good.

Two of the three take minutes and run on request: DS_LLMPQ_LONG_TESTS=1.
"""

import json
import os
import subprocess
import threading
import time

import pytest
from harness import PRECISE, rows_of, write_input

# the harness has put the folder of these on the path
from launching import ROOT, Command, error_sentence, gone, wait_for_results, write_cluster
from simulated_hosts import reason_to_skip, two_hosts

pytestmark = [pytest.mark.netns, pytest.mark.launcher, pytest.mark.slow]
REQUESTS = 600
CUT_SECONDS = 30
on_request = pytest.mark.skipif("DS_LLMPQ_LONG_TESTS" not in os.environ, reason="takes minutes; DS_LLMPQ_LONG_TESTS=1")


@pytest.fixture
def hosts(tmp_path):
    if reason := reason_to_skip():
        pytest.skip(f"cut cables were not tested: {reason}")
    (tmp_path / "hosts").mkdir()
    with two_hosts(tmp_path / "hosts") as both:
        yield both


@pytest.fixture
def running(hosts, tmp_path):
    """Starts a run over both hosts whose cable can be pulled; returns it when the first result is there."""
    # nodeA could hold all layers, but half of them are pinned to nodeB
    cluster = write_cluster(tmp_path / "cluster.yaml", {"nodeA": [48], "nodeB": [24]})
    rows = write_input(tmp_path / "rows.jsonl", REQUESTS)
    left = []

    def start(*options):
        arguments = (
            "run", f"cluster_file={cluster}", f"input={rows}", f"out={tmp_path / 'out'}", "workload.sequences=8",
            "workload.prompt_tokens=40", "workload.generated_tokens=24", r"+planner.pins.layers={nodeB\:0:[4,8]}",
            "run.backoff_seconds=1", *PRECISE, *options,
        )  # fmt: skip
        command = Command(arguments, prefix=(*hosts[0].inside(), "env", "--chdir", str(ROOT)))
        process = command.start()
        left.append(process)
        wait_for_results(tmp_path / "out" / "results.jsonl", process)
        return process

    yield start
    for process in left:
        process.kill()
        process.communicate()


def pull(host):
    host.run("ip", "link", "set", host.interface, "down")


def plug_in(host):
    host.run("ip", "link", "set", host.interface, "up")


def ended(process):
    out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@on_request
def test_a_cable_that_comes_back_is_waited_for(hosts, running, tmp_path):
    process = running()
    pull(hosts[1])
    timer = threading.Timer(CUT_SECONDS, plug_in, [hosts[1]])
    timer.start()
    before = time.monotonic()
    result = ended(process)
    timer.join()
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - before >= CUT_SECONDS - 5
    assert len(rows_of(tmp_path / "out")) == REQUESTS
    assert gone(lambda: [each for host in hosts for each in host.processes()])


@on_request
def test_without_the_other_host_it_stops_and_names_it(hosts, running, tmp_path):
    process = running("run.hang_seconds=10", "run.restarts=1")
    pull(hosts[1])
    result = ended(process)
    assert result.returncode == 1
    assert "nodeB:0 did not come back" in error_sentence(result)
    kept = rows_of(tmp_path / "out")
    assert 0 < len(kept) < REQUESTS
    assert gone(hosts[0].processes)
    plug_in(hosts[1])


def test_without_the_other_host_a_new_plan_goes_on(hosts, running, tmp_path):
    process = running("run.hang_seconds=10", "run.restarts=1", "run.on_loss=replan")
    pull(hosts[1])
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert len(rows_of(tmp_path / "out")) == REQUESTS
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert {stage["host"] for stage in plan["stages"]} == {"nodeA"}
    restarts = json.loads((tmp_path / "out" / "metrics.json").read_text())["restarts"]
    assert restarts["replans"] == 1
    assert restarts["results_before"] == 0
