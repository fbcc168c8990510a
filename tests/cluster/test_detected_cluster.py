"""`cluster=auto`: whatever this host has, detected when a command starts."""

import pytest

from ds_llmpq import config
from ds_llmpq.cluster import detect
from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.serving.batch_run import _list_plan_inputs

GPUS = (
    "0, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9\n"
    "1, 00000000:02:00.0, NVIDIA GeForce RTX 3060, 12288, 12000, 8.6\n"
)


def load(*overrides, command="run"):
    composed = config.composed(command, ["cluster=auto", *overrides])
    return config.load_cluster(config.to_object(composed, config.COMMANDS[command]))


def test_gpus_are_taken_where_there_are_any(monkeypatch):
    monkeypatch.setattr(detect, "query_gpus", lambda: detect.parse_gpus(GPUS))
    cluster = Cluster.from_config(load().cluster)
    assert [(device.name, device.type.name) for device in cluster.devices] == [
        ("localhost:0", "rtx_4090"),
        ("localhost:1", "rtx_3060"),
    ]
    assert cluster.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_without_a_gpu_the_processor_is_one_stage(monkeypatch):
    monkeypatch.setattr(detect, "query_gpus", list)
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
    monkeypatch.setattr(detect, "query_gpus", list)
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
