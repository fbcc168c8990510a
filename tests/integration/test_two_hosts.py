"""A pipeline over two hosts: the real launcher over ssh and pdsh, gloo over a cable between two network namespaces."""

import shlex
import signal
import subprocess

import pytest
import yaml
from launching import (
    BUDGETS,
    PRECISE,
    ROOT,
    TEXT,
    WORKLOAD,
    Command,
    completion,
    environment,
    error_sentence,
    gone,
    wait_for_results,
    write_cluster,
    write_rows,
)
from simulated_hosts import reason_to_skip, two_hosts

from ds_llmpq.plan import read_plan

pytestmark = [pytest.mark.netns, pytest.mark.launcher]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := reason_to_skip():
        pytest.skip(f"two hosts were not tested: {reason}")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def on_first(hosts, checkpoint, tmp_path):
    """Commands of `ds-llmpq` on the first host, for a cluster of both, whose devices are those of the local run."""
    cluster = write_cluster(
        tmp_path / "cluster.yaml", {host.name: [mib] for host, mib in zip(hosts, BUDGETS, strict=True)}
    )
    prefix = (*hosts[0].inside(), "env", "--chdir", str(ROOT))
    own = (f"model.path={checkpoint}", f"cluster_file={cluster}", *PRECISE, *WORKLOAD)
    return lambda command, *arguments: Command((command, *own, *arguments), prefix=prefix)


def sorted_rows(folder):
    return sorted((folder / "results.jsonl").read_bytes().splitlines())


def test_results_are_byte_identical_to_the_local_run(hosts, on_first, local_run, prompts, tmp_path):
    ended = on_first("run", f"input={prompts}", f"out={tmp_path / 'out'}").run()
    assert ended.returncode == 3, ended.stderr + (tmp_path / "out" / "launcher.log").read_text()
    here, there = read_plan(local_run.out / "plan.json"), read_plan(tmp_path / "out" / "plan.json")
    assert [stage.bits for stage in there.stages] == [stage.bits for stage in here.stages]
    assert {stage.host for stage in there.stages} == {"nodeA", "nodeB"}
    assert sorted_rows(tmp_path / "out") == sorted_rows(local_run.out)
    assert not [process for host in hosts for process in host.processes()]


def test_the_printed_line_runs_on_both_hosts(hosts, on_first, local_run, prompts, tmp_path):
    planned = on_first("plan", f"out={tmp_path / 'plan'}").run().stdout
    (line,) = (text.removeprefix("by hand: ") for text in planned.splitlines() if text.startswith("by hand: "))
    line = line.replace("input=FILE", f"input={prompts}").replace("output=DIR", f"output={tmp_path / 'out'}")
    shell = [*hosts[0].inside(), "bash", "-c", f"cd {shlex.quote(str(ROOT))} && {line}"]
    ended = subprocess.run(shell, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert sorted_rows(tmp_path / "out") == sorted_rows(local_run.out)


def test_a_calibration_times_both_hosts(hosts, on_first, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "cluster.yaml"
    write_cluster(file, {host.name: [mib] for host, mib in zip(hosts, BUDGETS, strict=True)})
    cluster = yaml.safe_load(file.read_text())
    cluster["device_types"]["other"] = cluster["device_types"]["cpu_core"]
    cluster["hosts"][1]["devices"][0]["type"] = "other"
    file.write_text(yaml.safe_dump(cluster))
    ended = on_first("plan", "planner.calibrate=always", f"out={tmp_path / 'plan'}").run()
    assert ended.returncode == 0, ended.stderr
    assert "(over ssh: nodeB)" in ended.stderr
    origins = read_plan(tmp_path / "plan" / "plan.json").provenance
    times = {name: origin for name, origin in origins.items() if name.startswith("layer_seconds.")}
    assert set(times) == {"layer_seconds.cpu_core", "layer_seconds.other"}
    assert all(origin.startswith("fitted") for origin in times.values())
    assert not [process for host in hosts for process in host.processes()]


def test_an_interrupt_ends_the_ranks_of_both_hosts(hosts, on_first, tmp_path):
    rows = [completion(f"row-{index}", TEXT, 24) for index in range(4000)]
    command = on_first("run", f"input={write_rows(tmp_path / 'rows.jsonl', rows)}", f"out={tmp_path / 'out'}")
    process = command.start()
    wait_for_results(tmp_path / "out" / "results.jsonl", process)
    assert all(host.processes() for host in hosts)
    (run,) = (each for each in hosts[0].processes() if each.cmdline()[1:4] == ["-m", "ds_llmpq", "run"])
    run.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert error_sentence(subprocess.CompletedProcess([], 130, out, err)).startswith("error: Interrupted")
    assert gone(lambda: [process for host in hosts for process in host.processes()])
