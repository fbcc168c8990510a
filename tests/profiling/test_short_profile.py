"""The short profile that `plan` makes by itself: what is measured, what is kept, and where it is not tried."""

import json
import os
import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig, LinksConfig
from ds_llmpq.cluster.detect import parse_gpus
from ds_llmpq.cost.fit import FEWEST_POINTS
from ds_llmpq.cost.fitted import load_model
from ds_llmpq.cost.profile import Point, Sample, append, current_setup, read_profile, write_header
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import read_shape
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.profiling import host_trials, short_profile, trial_list
from ds_llmpq.profiling.points import TimingTask
from ds_llmpq.profiling.short_profile import calibrate, find_obstacle
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import Groups
from ds_llmpq.serving.planning import make_plan
from ds_llmpq.shipped import asset

CPU = DeviceTypeConfig("cpu", 1 << 30, 2e10, {"float32": 1e11}, source="datasheet: none")

LINKS = LinksConfig(LinkConfig(1e-5, 1e9), LinkConfig(1e-5, 1e9))


def log_name():
    return f"trial.{socket.gethostname()}.log"


def make_cluster(*types, host="localhost", kind=CPU):
    devices = [DeviceConfig(type=name, slot=slot, memory_bytes=1 << 28) for slot, name in enumerate(types)]
    return Cluster.from_config(ClusterConfig("one", dict.fromkeys(types, kind), [HostConfig(host, devices)], LINKS))


@pytest.fixture
def wanted():
    path = str(asset("tiny-llama"))
    shape = read_shape(path)
    setup = current_setup(shape, "float32", DEQUANTIZE, Groups())
    sizes = {"prefill": [1, 2], "decode": [1, 2, 4]}
    quant = QuantConfig(kernel="dequantize")
    return TimingTask(path, shape, WorkloadConfig(4, 13, 6), quant, "float32", (8, 16), sizes, setup)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial_list, "POINT_SECONDS", {"cpu": 2.0, "cuda": 2.0})
    monkeypatch.setattr(trial_list, "LATE_SECONDS", {"cpu": 200.0, "cuda": 200.0})  # crowded machines leave none out
    return tmp_path / "cache" / "ds_llmpq" / "calibration"


@pytest.fixture
def made(cache, monkeypatch):
    """Nothing is really measured: the folders that were asked for, each an empty profile's."""
    found = []

    def measure(wanted, cluster, out, advance):
        found.append(out)
        time.sleep(0.1)
        write_header(out / "profile.csv", wanted.setup, {})

    monkeypatch.setattr(short_profile, "_measure", measure)
    monkeypatch.delenv(short_profile.CALIBRATE)
    return found


def test_both_devices_are_timed_once_and_then_read_from_the_cache(wanted, cache):
    cluster, said, told = make_cluster("fast", "slow"), [], []
    folder = calibrate(wanted, cluster, "always", said.append, lambda *done: told.append(done))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1] > 20
    assert folder.parent == cache
    assert {entry.name for entry in cache.iterdir()} == {".lock", log_name(), folder.name}  # nothing half made is left
    model = load_model(folder, wanted.shape, wanted.setup)
    for name in ("fast", "slow"):
        for part, phase, bits in (("layer", "prefill", 8), ("layer", "decode", 16), ("head", "decode", 0)):
            fit = model.get(name, part, phase, bits)
            assert all(entry.seconds > 0 for entry in fit.residuals)
            assert fit.batch_range == (1, 4 if part == "head" or phase == "decode" else 2)
        assert model.get(name, "last", "decode") is not None
        assert model.get(name, "middle", "decode") is None  # no plan of two devices has one
        assert 0 <= model.contention[name] < 1
        alone, mixed = (model.get(name, part, "prefill") for part in ("new_size", "new_size_mixed"))
        of_one = {entry.length_tokens: entry.seconds for entry in alone.residuals}
        assert all(both.seconds >= of_one[both.length_tokens] for both in mixed.residuals)
        assert model.get(name, "layer", "prefill", 16).length_range == (1, 16)  # of 13 tokens: up to a power of two
        assert all(0 < model.alone[name, phase] <= 1 for phase in ("prefill", "decode"))
    assert "localhost:0,localhost:1,activation" in (folder / "links.csv").read_text()
    assert calibrate(wanted, cluster, "never", said.append) is None


def test_what_was_measured_before_is_taken_unless_always(wanted, made, monkeypatch):
    cluster, quiet = make_cluster("fast"), [].append
    first = calibrate(wanted, cluster, "auto", quiet)
    assert calibrate(replace(wanted, workload=WorkloadConfig(4, 9, 5)), cluster, "auto", quiet) == first
    assert len(made) == 1
    assert calibrate(wanted, cluster, "always", quiet) == first
    assert len(made) == 2
    others = (
        replace(wanted, workload=WorkloadConfig(4, 17, 6)),
        replace(wanted, setup=replace(wanted.setup, kernel="other")),
        replace(wanted, setup=replace(wanted.setup, zeros="whole")),
        replace(wanted, sizes=wanted.sizes | {"decode": [1, 2, 4, 8]}),
    )
    assert len({first, *(calibrate(other, cluster, "auto", quiet) for other in others)}) == 5
    assert calibrate(wanted, make_cluster("slow"), "auto", quiet) != first
    monkeypatch.setenv(short_profile.CALIBRATE, "never")
    assert calibrate(wanted, cluster, "auto", quiet) is None


def test_what_cannot_be_measured_or_kept_leaves_a_plan_on_the_roofline(wanted, cache, tmp_path, monkeypatch):
    def fail(wanted, cluster, out, advance):
        raise UserError("the trial pipeline failed; see LOG")

    said = []
    monkeypatch.delenv(short_profile.CALIBRATE)
    monkeypatch.setattr(short_profile, "_measure", fail)
    assert calibrate(wanted, make_cluster("fast"), "auto", said.append) is None
    assert said[-1] == "layer times are not measured: the trial pipeline failed; see LOG"
    assert [entry.name for entry in cache.iterdir()] == [".lock"]
    with pytest.raises(UserError, match=r"planner\.calibrate=always cannot be: the trial pipeline failed"):
        calibrate(wanted, make_cluster("fast"), "always", said.append)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibrate(wanted, make_cluster("fast"), "auto", said.append) is None
    assert "cannot be used (Not a directory); name a folder for them in XDG_CACHE_HOME" in said[-1]
    assert "Errno" not in said[-1]


def test_a_trial_that_fails_says_why_and_keeps_its_log(wanted, cache, monkeypatch):
    said = []
    monkeypatch.delenv(short_profile.CALIBRATE)
    monkeypatch.setenv("RANK", "1")  # as where another launcher started this process
    broken = replace(wanted, path=str(cache))
    assert calibrate(broken, make_cluster("fast"), "auto", said.append) is None
    assert re.search(r"the trial pipeline failed \(\w+.*\); see ", said[-1])
    assert "Traceback" in Path(said[-1].rpartition("see ")[2]).read_text()


def test_a_damaged_profile_is_measured_again(wanted, made):
    folder = calibrate(wanted, make_cluster("fast"), "auto", [].append)
    assert calibrate(wanted, make_cluster("fast"), "auto", [].append) == folder
    assert len(made) == 1
    (folder / "profile.csv").write_text("damaged")
    assert calibrate(wanted, make_cluster("fast"), "auto", [].append) == folder
    assert len(made) == 2


def test_of_plans_made_side_by_side_one_measures(wanted, made):
    said = []
    with ThreadPoolExecutor(4) as pool:
        folders = [pool.submit(calibrate, wanted, make_cluster("fast"), "auto", said.append) for _ in range(4)]
        assert len({folder.result() for folder in folders}) == 1
    assert len(made) == 1
    assert sum(text.startswith("timed in") for text in said) == 1
    assert "waiting for another command that times these devices" in said


def test_lengths_are_not_rounded_beyond_the_models_positions(wanted):
    most = wanted.shape.max_positions
    rounded = short_profile._round_sizes(replace(wanted, workload=WorkloadConfig(4, most - 100, 90)))
    assert (rounded.workload.prompt_tokens, rounded.workload.generated_tokens) == (most - 100, 90)


def test_a_model_larger_than_half_of_the_memory_is_not_measured(wanted, cache, monkeypatch):
    said = []
    monkeypatch.delenv(short_profile.CALIBRATE)
    with pytest.raises(UserError, match="'often' but must be one of auto, always, never"):
        calibrate(wanted, make_cluster("fast"), "often", said.append)
    monkeypatch.setattr(host_trials, "available_memory_bytes", lambda: 1 << 20)
    assert calibrate(wanted, make_cluster("fast"), "auto", said.append) is None
    assert "more than half of the 1 MiB that are free on localhost" in said[-1]
    monkeypatch.setattr(host_trials, "available_memory_bytes", lambda: 1 << 34)
    many = replace(wanted, sizes={"prefill": [1], "decode": [1, 10**9]})
    assert calibrate(many, make_cluster("fast"), "auto", said.append) is None
    assert re.search(r"it would take \d{7,} MiB, more than half of", said[-1])
    assert not cache.exists()


def test_a_gpu_of_another_type_is_not_measured_in_its_place(wanted, monkeypatch):
    gpus = parse_gpus(
        "0, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9\n"
        "1, 00000000:02:00.0, NVIDIA GeForce RTX 9999, 24564, 24000, 8.9\n"
    )
    monkeypatch.setattr(host_trials, "query_gpus", lambda: gpus)
    kind, hosts = replace(CPU, kind="cuda"), {"localhost": host_trials.describe_host(wanted.setup.libraries)}
    assert find_obstacle(wanted, make_cluster("rtx_4090", "gpu_of_no_type", kind=kind), hosts) is None
    assert "is a rtx_4090, not a v100" in find_obstacle(wanted, make_cluster("v100", kind=kind), hosts)
    three = make_cluster("rtx_4090", "rtx_4090", "rtx_4090", kind=kind)
    assert "localhost:1 is" not in find_obstacle(wanted, three, hosts)
    assert "no GPU localhost:2" in find_obstacle(wanted, three, hosts)


# What ssh does, less the network: the other side's shell reads the last argument. `old` has another torch.
SSH = """#!/bin/sh
for word; do command=$word; done
case "$*" in
  *"-- away "*) echo "ssh: connect to host away port 22: No route to host" >&2; exit 255;;
  *"-- old "*) sh -c "$command" | sed 's/"torch": "[^"]*"/"torch": "1.0"/';;
  *) exec sh -c "$command";;
esac
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv(short_profile.CALIBRATE)


def make_hosts(**types):
    """A host by each name, with one device of its type."""
    hosts = [HostConfig(name, [DeviceConfig(type=kind, memory_bytes=1 << 28)]) for name, kind in types.items()]
    return Cluster.from_config(ClusterConfig("one", dict.fromkeys(types.values(), CPU), hosts, LINKS))


def test_other_hosts_are_timed_over_ssh(wanted, cache, ssh):
    cluster, said = make_hosts(localhost="near", one="far", two="far"), []
    folder = calibrate(wanted, cluster, "auto", said.append)
    assert folder is not None, said
    assert "timing layers on the devices of these hosts (over ssh: one), once" in said[0]
    model = load_model(folder, wanted.shape, wanted.setup)
    for name in ("near", "far"):
        assert model.get(name, "layer", "decode", 8).batch_range == (1, 4)
        assert model.get(name, "middle", "decode") is not None
    rows = [row.split(",")[:7] for row in (folder / "profile.csv").read_text().splitlines() if row.startswith("far,")]
    assert len(rows) == len(set(map(tuple, rows))), "two hosts with one type"
    assert calibrate(wanted, cluster, "auto", said.append) == folder
    assert sum(text.startswith("timing layers") for text in said) == 1


def test_a_host_that_cannot_be_timed_leaves_a_plan_on_the_roofline(wanted, cache, ssh):
    said = []
    assert calibrate(wanted, make_hosts(localhost="near", away="far"), "auto", said.append) is None
    assert said[0].startswith("layer times are not measured: 1 of 1 hosts gave no answer (away: ssh cannot reach it")
    assert calibrate(wanted, make_hosts(old="far"), "auto", said.append) is None
    assert re.fullmatch(r"layer times are not measured: old has torch 1\.0, but torch \S+ is in use here", said[1])
    with pytest.raises(UserError, match=r"planner\.calibrate=always cannot be: old has torch 1\.0"):
        calibrate(wanted, make_hosts(old="far"), "always", said.append)
    assert not cache.exists()


def test_another_driver_or_number_of_cores_is_measured_anew(wanted, made, monkeypatch):
    found = [calibrate(wanted, make_cluster("fast"), "auto", [].append)]
    monkeypatch.setattr(host_trials, "_list_gpus", lambda: ("NVIDIA L4, 580.1",))
    found.append(calibrate(wanted, make_cluster("fast"), "auto", [].append))
    monkeypatch.setattr(host_trials, "_list_gpus", lambda: ("NVIDIA L4, 590.1",))
    found.append(calibrate(wanted, make_cluster("fast"), "auto", [].append))
    monkeypatch.setattr(host_trials, "count_usable_cores", lambda: 999)
    found.append(calibrate(wanted, make_cluster("fast"), "auto", [].append))
    assert len(set(found)) == len(made) == 4


@pytest.mark.parametrize("types", ["a", "ab", "aab", "abcd", "aaaa", "abcdefg", "aaaaab"])
def test_every_type_is_timed_and_at_most_three_devices_at_once(types):
    names = [f"type_{letter}" for letter in types]
    devices = [DeviceConfig(type=name, slot=slot, memory_bytes=1 << 28) for slot, name in enumerate(names)]
    cluster = Cluster.from_config(
        ClusterConfig("one", dict.fromkeys(names, CPU), [HostConfig("localhost", devices)], LINKS)
    )
    groups = trial_list.group_for_trials(cluster)["localhost"]
    assert {device.type.name for group in groups for device in group} == set(names)
    assert all(1 <= len(group) <= 3 for group in groups)
    assert len(groups) == -(-len(set(names)) // 3)
    assert sum(map(len, groups)) >= min(3, len(names))


def test_a_plan_by_default_settings_stands_on_measured_times(cache, tmp_path, monkeypatch):
    monkeypatch.delenv(short_profile.CALIBRATE)
    composed = config.compose_settings(
        "plan", ["+experiment=demo", "planner.solver=search", f"out={tmp_path / 'plan'}"]
    )
    settings = config.load_cluster(config.to_object(composed, config.COMMANDS["plan"]))
    (tmp_path / "plan").mkdir()
    plan = make_plan(settings, tmp_path / "plan")
    assert plan.provenance["layer_seconds.cpu_core"].startswith("fitted")
    assert plan.provenance["links"].startswith("measured (links.csv)")
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    kernel = read_profile(folder / "profile.csv").setup.kernel
    assert f"(kernel {kernel};" in plan.provenance["layer_seconds.cpu_core"]
    never = replace(settings, planner=replace(settings.planner, calibrate="never"))
    plan = make_plan(never, tmp_path / "plan")
    assert plan.provenance["layer_seconds.cpu_core"].startswith("roofline")
    assert json.loads((tmp_path / "plan" / "problem.json").read_text())


def test_light_points_come_first_and_the_smallest_micro_batch_has_three_lengths(wanted):
    device = make_cluster("fast").devices[0]
    points = trial_list._list_points(short_profile._round_sizes(wanted), device)
    layers = [point for point in points if point.part == "layer" and point.bits == 8]
    tokens = [point.tokens for point in points]
    assert tokens == sorted(tokens)
    assert [(p.batch, p.length_tokens) for p in layers if p.phase == "prefill"] == [
        (1, 1), (1, 4), (2, 4), (1, 16), (2, 16)
    ]  # fmt: skip
    assert {p.length_tokens for p in layers if p.phase == "decode" and p.batch == 1} == {4, 20, 22}
    assert {p.length_tokens for p in layers if p.phase == "decode" and p.batch == 4} == {4, 20}


def test_every_micro_batch_is_timed_at_the_workloads_length_and_three_at_another(wanted):
    many = replace(wanted, sizes={"prefill": [1], "decode": [1, 2, 4, 8, 16]})
    points = trial_list._list_points(short_profile._round_sizes(many), make_cluster("fast").devices[0])
    lengths = {size: {p.length_tokens for p in points if p.phase == "decode" and p.batch == size and p.part == "layer"}
               for size in (2, 4, 8, 16)}  # fmt: skip
    assert lengths == {2: {20}, 4: {20, 4}, 8: {20}, 16: {20, 4}}


def test_a_crowded_machine_is_named_in_the_line_on_what_was_timed(wanted, made, monkeypatch):
    measure, said = short_profile._measure, {1.1: [], 2.6: []}
    for slowed, lines in said.items():

        def note(wanted, cluster, out, advance, slowed=slowed):
            measure(wanted, cluster, out, advance)
            write_header(out / "profile.csv", wanted.setup, {"slowed": slowed})

        monkeypatch.setattr(short_profile, "_measure", note)
        calibrate(wanted, make_cluster("fast"), "always", lines.append)
    assert [len(lines) for lines in said.values()] == [2, 2]
    assert "; the machine was busy: timing took 2.6 times as long as it worked" in said[2.6][-1]
    assert "busy" not in said[1.1][-1]


@pytest.mark.parametrize(("slowed", "said"), [(1.1, 0), (2.6, 1)])
def test_times_from_a_crowded_machine_are_named_whenever_they_are_used(wanted, made, slowed, said):
    file = calibrate(wanted, make_cluster("fast"), "always", str) / "profile.csv"
    file.write_text(file.read_text().replace('"note": {}', f'"note": {{"slowed": {slowed}}}'))
    lines = []
    assert calibrate(wanted, make_cluster("fast"), "auto", lines.append) == file.parent
    assert len(made) == 1, "nothing was measured again"
    assert [f"timing took {slowed} times" in line for line in lines] == [True] * said


@pytest.mark.parametrize(("disturbed", "said"), [(1.0, 0), (6.0, 1)])
def test_times_that_do_not_fit_are_named_whenever_they_are_used(wanted, made, disturbed, said):
    folder = calibrate(wanted, make_cluster("fast"), "always", str)
    points = [Point("fast", "layer", "decode", 16, batch, past) for batch in (1, 2, 4) for past in (4, 16)]
    times = [1e-3 * (disturbed if index in (1, 4) else 1.0) for index in range(len(points))]
    append(folder / "profile.csv", [Sample(p, 0, 3, 3, t, t, 0.0) for p, t in zip(points, times, strict=True)])
    lines = []
    assert calibrate(wanted, make_cluster("fast"), "auto", lines.append) == folder
    assert ["left out of their fit are off by" in line for line in lines] == [True] * said


def test_one_token_of_one_sequence_has_points_enough_for_every_fit(wanted):
    alone = replace(wanted, workload=WorkloadConfig(1, 1, 1), sizes={"prefill": [1], "decode": [1]})
    alone, cluster = short_profile._round_sizes(alone), make_cluster("fast")
    trial = trial_list.build_trial(alone, list(cluster.devices), 3, links=False)["spec"]
    assert len(trial["sizes"]) >= FEWEST_POINTS  # of what passes cost beside their layers
    points = trial["points"]["devices"][0]["points"]
    kinds = Counter((point["part"], point["phase"], point["bits"]) for point in points)
    assert {part for part, _, _ in kinds} == {"layer", "embed", "head"}
    assert min(kinds.values()) >= FEWEST_POINTS


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([{}], r"what away printed.*'links'"),
        ([], "away ran 0 trials of 1"),
        ([{"links": [], "passes": [], "periods": [], "samples": [], "took": [[1.0, "x"]]}], r"took.*'x'"),
    ],
)
def test_hosts_that_answer_otherwise_are_named(monkeypatch, answer, said):
    monkeypatch.setattr(host_trials, "ask_hosts", lambda questions, seconds: [answer])
    with pytest.raises(UserError, match=said):
        host_trials.time_on_hosts({"away": [{}]}, lambda done, total: None)
