"""Detection from recorded answers of nvidia-smi, and clusters written by it read back as clusters."""

import subprocess
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from ds_llmpq.cluster import detect as detecting
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.cluster_file import merge, write_cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceTypeConfig
from ds_llmpq.cluster.detect import (
    MIB,
    available_memory_bytes,
    count_memory_kills,
    detect,
    find_type,
    parse_gpus,
    query_gpus,
)
from ds_llmpq.cluster.rates import measure_cpu, measure_gpu, time_best
from ds_llmpq.config import read_device_types
from ds_llmpq.errors import UserError

ANSWER = """0, 00000000:3B:00.0, Tesla T4, 15360, 14900, 7.5
1, 00000000:05:00.0, NVIDIA A100-SXM4-40GB, 40960, 40400, 8.0
"""
GPU_RATES = {"float16": 6e13, "float32": 8e12}
KNOWN = {
    name: DeviceTypeConfig("cuda", 1 << 34, 3e11, dict(GPU_RATES), source=f"datasheet: {name}")
    for name in ("t4", "a100_40")
} | {"cpu_core": DeviceTypeConfig("cpu", 0, 2e10, {"float32": 1e11}, source="measured: elsewhere")}


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A host of four cores and 8 GiB of free memory, whatever runs the test."""
    monkeypatch.setattr(detecting, "count_usable_cores", lambda: 4)
    monkeypatch.setattr(detecting, "available_memory_bytes", lambda: 8 << 30)


def as_cluster(plain):
    return Cluster.from_config(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), plain)))


def test_gpus_are_in_pci_order():
    gpus = parse_gpus(ANSWER)
    assert [gpu.index for gpu in gpus] == [1, 0]
    assert (gpus[1].total_bytes, gpus[1].free_bytes) == (15360 * MIB, 14900 * MIB)
    with pytest.raises(UserError, match="expected index"):
        parse_gpus("0, bus, Tesla T4, [N/A], 1, 7.5")


def test_query_uses_list_arguments_and_survives_a_host_without_gpus():
    calls = []

    def answer(command, **options):
        calls.append((command, options))
        return SimpleNamespace(returncode=0, stdout=ANSWER)

    assert len(query_gpus(answer)) == 2
    assert calls[0][0][0] == "nvidia-smi"
    assert "shell" not in calls[0][1]
    assert query_gpus(lambda *_, **__: SimpleNamespace(returncode=9, stdout="no driver")) == []
    for error in (FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 60)):

        def fail(*_, error=error, **__):
            raise error

        assert query_gpus(fail) == []


@pytest.mark.parametrize(
    ("name", "total_mib", "expected"),
    [
        ("Tesla T4", 15360, "t4"),
        ("Tesla P100-PCIE-12GB", 12198, "p100"),
        ("Tesla V100-SXM2-32GB", 32768, "v100"),
        ("NVIDIA A10", 23028, "a10"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100_40"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100_80"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100_80"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA H100 PCIe", 81559, "h100_pcie"),
        ("NVIDIA H100 NVL", 95830, "h100_nvl"),
        ("NVIDIA GH200 480GB", 97871, "gh200_96"),
        ("NVIDIA GH200 144G HBM3e", 147456, "gh200_144"),
        ("NVIDIA B200", 183359, "b200"),
        ("NVIDIA A2", 15356, "a2"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA L40", 46068, "l40"),
        ("NVIDIA A10G", 23028, "a10g"),
        ("NVIDIA RTX A6000", 49140, "rtx_a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx_6000_ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "rtx_pro_6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, None),
        ("NVIDIA GeForce RTX 2080 Ti", 11264, "rtx_2080_ti"),
        ("NVIDIA GeForce RTX 3060", 12288, "rtx_3060"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA GeForce RTX 3060 Ti", 8192, "rtx_3060_ti"),
        ("NVIDIA GeForce RTX 3050", 8192, "rtx_3050"),
        ("NVIDIA GeForce RTX 3050", 6144, None),
        ("NVIDIA GeForce RTX 2070 SUPER", 8192, "rtx_2070_super"),
        ("NVIDIA GeForce RTX 5050", 8151, "rtx_5050"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "rtx_4070_ti_super"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx_4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA GeForce RTX 5090", 32607, "rtx_5090"),
        ("Quadro RTX 6000", 24576, None),
        ("NVIDIA GeForce GTX 1080 Ti", 11264, None),
    ],
)
def test_names_of_known_gpus(name, total_mib, expected):
    gpu = detecting.Gpu(0, "0", name, total_mib * MIB, total_mib * MIB, "8.0")
    assert find_type(gpu) == expected


def test_detected_gpus_have_budgets_from_free_memory():
    cluster = as_cluster(detect(KNOWN, "node", gpus=parse_gpus(ANSWER)))
    assert [(device.name, device.type.name) for device in cluster.devices] == [("node:0", "a100_40"), ("node:1", "t4")]
    assert cluster.devices[1].memory_bytes == int(0.95 * 14900 * MIB) - 1930 * MIB
    assert cluster.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_unknown_gpu_is_usable_and_says_that_its_rates_are_assumed():
    gpus = parse_gpus("0, 00000000:01:00.0, NVIDIA RTX 4000 Ada Generation, 24564, 24000, 8.9\n")
    kind = as_cluster(detect(KNOWN, gpus=gpus)).devices[0].type
    assert kind.source.startswith("assumed: NVIDIA RTX 4000 Ada")
    assert kind.flops_per_second == {**GPU_RATES, "bfloat16": GPU_RATES["float16"]}
    assert KNOWN["t4"].flops_per_second == GPU_RATES
    full = parse_gpus("0, 00000000:01:00.0, Tesla T4, 15360, 100, 7.5\n")
    with pytest.raises(UserError, match="only 100 MiB free"):
        detect(KNOWN, gpus=full)


def test_cards_of_different_speed_stay_apart():
    shipped = read_device_types()
    found = detect(
        shipped,
        gpus=parse_gpus(
            "0, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9\n"
            "1, 00000000:02:00.0, NVIDIA GeForce RTX 3060, 12288, 12000, 8.6\n"
        ),
    )
    rates = [found["device_types"][name]["memory_bandwidth_bytes_per_second"] for name in ("rtx_4090", "rtx_3060")]
    assert rates == [1.008e12, 3.6e11]


def test_an_unknown_gpu_is_measured_once_where_it_can_be():
    asked = []

    def measure(slot):
        asked.append(slot)
        return {"memory_bandwidth_bytes_per_second": 5e11, "flops_per_second": {"float16": 9e13}, "source": "measured"}

    line = "NVIDIA RTX 4000 Ada Generation, 24564, 24000, 8.9\n"
    gpus = parse_gpus(f"0, 00000000:01:00.0, {line}1, 00000000:02:00.0, {line}")
    (kind,) = as_cluster(detect(KNOWN, gpus=gpus, measure_gpu=measure)).device_types.values()
    assert asked == [0]
    assert (kind.source, kind.memory_bandwidth_bytes_per_second, kind.compute_capability) == ("measured", 5e11, "8.9")
    assert measure_gpu(99) is None


def test_cpu_stages_share_cores_and_memory():
    cluster = as_cluster(detect(KNOWN, cpu_stages=2, gpus=[]))
    assert [device.threads for device in cluster.devices] == [2, 2]
    assert cluster.devices[0].memory_bytes == int(0.9 * (8 << 30) / 2) - 512 * MIB
    assert len(as_cluster(detect(KNOWN, gpus=[])).devices) == 1
    mixed = as_cluster(detect(KNOWN, cpu_stages=1, gpus=parse_gpus(ANSWER)))
    assert [device.slot for device in mixed.devices] == [0, 1, 2]
    with pytest.raises(UserError, match="cpu_stages=5"):
        detect(KNOWN, cpu_stages=5, gpus=[])
    with pytest.raises(UserError, match="no device"):
        detect(KNOWN, cpu_stages=0, gpus=[])


def test_measured_rates_replace_the_shipped_ones():
    rates = {"memory_bandwidth_bytes_per_second": 9, "flops_per_second": {"float32": 7.0}, "source": "measured: here"}
    kind = as_cluster(detect(KNOWN, cpu_stages=4, gpus=[], cpu_rates=rates)).devices[0].type
    assert (kind.memory_bandwidth_bytes_per_second, kind.flops_per_second) == (9, {"float32": 7.0})
    assert kind.source == "measured: here"


def test_written_file_reads_back(tmp_path):
    plain = detect(KNOWN, "node", gpus=parse_gpus(ANSWER))
    write_cluster(tmp_path / "cluster.yaml", plain)
    assert yaml.safe_load((tmp_path / "cluster.yaml").read_text()) == plain


def test_merge_keeps_unlike_rates_apart():
    one, two = (detect(KNOWN, name, gpus=[]) for name in ("a", "b"))
    three = detect(KNOWN, "c", gpus=[], cpu_rates={"source": "measured: on c"})
    cluster = as_cluster(merge([one, two, three], "all"))
    assert [device.name for device in cluster.devices] == ["a:0", "b:0", "c:0"]
    assert [device.type.name for device in cluster.devices] == ["cpu_core_x4", "cpu_core_x4", "cpu_core_c_x4"]
    with pytest.raises(UserError, match="host a is in two"):
        merge([one, one], "all")
    with pytest.raises(UserError, match="nothing to merge"):
        merge([], "all")


def test_kills_are_counted_by_the_control_group_or_else_the_host(tmp_path):
    assert count_memory_kills(tmp_path, tmp_path) == 0
    (tmp_path / "vmstat").write_text("nr_free 12\noom_kill 7\n")
    assert count_memory_kills(tmp_path, tmp_path) == 7
    (tmp_path / "memory.events").write_text("oom 4\noom_kill 2\noom_group_kill 0\n")
    assert count_memory_kills(tmp_path, tmp_path) == 2


def test_available_memory_heeds_the_control_group(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 4900
    (tmp_path / "memory.stat").write_text("anon 60\ninactive_file 30\nactive_file 10\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 4930


def test_best_seconds_is_the_minimum_within_the_budget():
    """A clock that a list drives: runs of 5, 3 and 4 seconds, a look at the time before the third and after it."""
    times = iter([0, 0, 5, 5, 8, 8, 8, 12, 30])
    assert time_best(lambda: None, 20, clock=lambda: next(times)) == 3


def test_measured_cpu_rates_make_a_valid_type():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    rates = measure_cpu(threads=1, seconds=0.05)
    assert torch.get_num_threads() == before
    assert rates["source"].startswith("measured on this host")
    kind = as_cluster(detect(KNOWN, cpu_stages=4, gpus=[], cpu_rates=rates)).devices[0].type
    assert kind.flops_per_second["float32"] > 1e8
    assert kind.memory_bandwidth_bytes_per_second > 1e8
