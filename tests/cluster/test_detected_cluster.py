"""`cluster=auto`: whatever this host has, detected when a command starts."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from ds_llmpq import config
from ds_llmpq.cluster import detect, rates
from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.errors import UserError
from ds_llmpq.serving.batch_run import _list_plan_inputs

GPUS = (
    "0, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9\n"
    "1, 00000000:02:00.0, NVIDIA GeForce RTX 3060, 12288, 12000, 8.6\n"
)


def load(*overrides, command="run"):
    composed = config.compose_settings(command, list(overrides))
    return config.load_cluster(config.to_object(composed, config.COMMANDS[command]))


@pytest.mark.parametrize("command", ["plan", "run", "profile", "evaluate"])
def test_it_is_what_commands_plan_for_unless_told(command, monkeypatch):
    monkeypatch.setattr(config, "query_gpus", list)
    settings = config.to_object(config.compose_settings(command, []), config.COMMANDS[command])
    assert [device.type for host in config.choose_cluster(settings).hosts for device in host.devices] == ["cpu_core"]


def test_gpus_are_taken_where_there_are_any(monkeypatch, capsys):
    monkeypatch.setattr(config, "query_gpus", lambda: detect.parse_gpus(GPUS))
    cluster = Cluster.from_config(load().cluster)
    assert [(device.name, device.type.name) for device in cluster.devices] == [
        ("localhost:0", "rtx_4090"),
        ("localhost:1", "rtx_3060"),
    ]
    assert cluster.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    said = capsys.readouterr().err
    assert said == "cluster=auto: rtx_4090 with 20.4 GiB on localhost, rtx_3060 with 9.2 GiB on localhost\n"


FULL = GPUS + "2, 00000000:03:00.0, NVIDIA GeForce RTX 4090, 24564, 900, 8.9\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["localhost:0", "localhost:1"]),
        ("1", ["localhost:1"]),
        ("2,1", ["localhost:1"]),
        ("0, 1, 7", ["localhost:0", "localhost:1"]),
        ("", ["cpu"]),
        ("-1", ["cpu"]),
    ],
)
def test_full_and_hidden_gpus_are_left_out_and_keep_their_slots(monkeypatch, capsys, visible, expected):
    monkeypatch.setattr(config, "query_gpus", lambda: detect.parse_gpus(FULL))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = Cluster.from_config(load().cluster).devices
    assert [device.name if device.type.kind == "cuda" else "cpu" for device in devices] == expected
    assert f"; {3 - len(expected) + (expected == ['cpu'])} GPUs are full or hidden" in capsys.readouterr().err


def test_where_all_gpus_are_full_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr(config, "query_gpus", lambda: detect.parse_gpus(FULL))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(UserError, match="a GPU has only 900 MiB free"):
        load()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8e0b")
    with pytest.raises(UserError, match="does not number GPUs"):
        load()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("run", ["plan=p.json"]), ("evaluate", ["plan=p.json"]), ("plan", ["problem=p.json"])],
)
def test_nothing_is_detected_where_nothing_is_planned(command, arguments, monkeypatch):
    monkeypatch.setattr(config, "query_gpus", lambda: pytest.fail("asked"))
    assert load(*arguments, command=command).cluster.hosts == []


def test_a_given_plan_that_may_be_replaced_needs_its_devices(monkeypatch):
    monkeypatch.setattr(config, "query_gpus", list)
    assert load("plan=p.json", "run.on_loss=replan").cluster.hosts


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Measurements are made up, and counted."""
    made = []

    def answer(command, **_):
        made.append(command[-2:])
        return SimpleNamespace(stdout=json.dumps({"memory_bandwidth_bytes_per_second": 7}))

    monkeypatch.delenv(rates.CALIBRATE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(subprocess, "run", answer)
    return made


def test_rates_are_measured_once_and_kept(measuring):
    first = rates.recall_rates("cpu", 2, "a processor")
    assert first == {"memory_bandwidth_bytes_per_second": 7}
    assert rates.recall_rates("cpu", 2, "a processor") == first
    assert measuring == [["cpu", "2"]]
    rates.recall_rates("cuda", 0, "a card")
    assert len(measuring) == 2


def test_a_damaged_cache_is_measured_again(measuring, tmp_path):
    (tmp_path / "cache" / "ds_llmpq").mkdir(parents=True)
    (tmp_path / "cache" / "ds_llmpq" / "rates.json").write_text("[]]")
    assert rates.recall_rates("cpu", 2, "a processor")
    assert len(measuring) == 1


def test_a_busy_processor_and_one_that_cannot_be_measured_keep_the_shipped_rates(measuring, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert rates.recall_rates("cpu", 2, "a processor") is None
    assert measuring == []

    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert rates.recall_rates("cuda", 0, "a card") is None


def test_cores_are_those_of_the_affinity_once_each_and_within_the_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8}, raising=False)
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert detect.count_usable_cores(tmp_path, tmp_path) == 3  # of cpu8 nothing is said
    for quota, expected in (("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert detect.count_usable_cores(tmp_path, tmp_path) == expected


def test_without_a_gpu_the_processor_is_one_stage(monkeypatch):
    monkeypatch.setattr(config, "query_gpus", list)
    monkeypatch.setattr(config, "computes_bfloat16", lambda: False)
    cluster = Cluster.from_config(load().cluster)
    (device,) = cluster.devices
    assert device.type.kind == "cpu"
    assert device.threads == detect.count_usable_cores()
    assert choose_dtype(cluster) == "float32"
    monkeypatch.setattr(config, "computes_bfloat16", lambda: True)
    assert choose_dtype(Cluster.from_config(load().cluster)) == "bfloat16"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", True),
        ("flags\t\t: fpu avx2 fma\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("nothing of the kind\n", True),
    ],
)
def test_bfloat16_follows_from_the_processors_flags(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert detect.computes_bfloat16(tmp_path / "cpuinfo") is expected
    assert detect.computes_bfloat16(tmp_path / "missing")


def test_a_run_goes_on_though_other_memory_is_free(monkeypatch):
    monkeypatch.setattr(config, "query_gpus", list)
    seen = []
    for free in (8 << 30, 6 << 30):
        monkeypatch.setattr(detect, "available_memory_bytes", lambda free=free: free)
        settings = load()
        assert settings.cluster.hosts[0].devices[0].memory_bytes < free
        seen.append(_list_plan_inputs(settings, None))
    assert seen[0] == seen[1]


def test_devices_given_beside_it_are_not_replaced():
    listed = load("cluster=local_cpu1", "cluster.name=auto")
    assert len(listed.cluster.hosts[0].devices) == 1
    assert listed.cluster.hosts[0].devices[0].memory_bytes == 2 << 30
