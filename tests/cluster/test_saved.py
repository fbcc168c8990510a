"""Another host from what was saved there: GPUs in both forms of CSV, and the topology matrix."""

import pytest
from omegaconf import OmegaConf

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.cluster.saved import build_links, parse_saved_gpus, parse_topology
from ds_llmpq.commands import detect
from ds_llmpq.commands.config import DetectConfig
from ds_llmpq.errors import UserError

PLAIN = """0, 00000000:3B:00.0, Tesla V100-SXM2-32GB, 32768, 32000, 7.0
1, 00000000:05:00.0, Tesla T4, 15360, 14900, 7.5
2, 00000000:06:00.0, Tesla T4, 15360, 14900, 7.5
"""
WITH_HEAD = """name, index, memory.total [MiB], pci.bus_id, memory.free [MiB], compute_cap, driver_version
Tesla V100-SXM2-32GB, 0, 32768 MiB, 00000000:3B:00.0, 32000 MiB, 7.0, 550.54
Tesla T4, 1, 15360 MiB, 00000000:05:00.0, 14900 MiB, 7.5, 550.54
Tesla T4, 2, 15360 MiB, 00000000:06:00.0, 14900 MiB, 7.5, 550.54
"""
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tSYS\tNV2\tPHB\t0-19\t0
GPU1\tSYS\t X \tPHB\tSYS\t20-39\t1
GPU2\tNV2\tPHB\t X \tSYS\t20-39\t1
NIC0\tPHB\tSYS\tSYS\t X

Legend:
  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def test_both_forms_of_csv_are_the_same_gpus_in_pci_order():
    gpus = parse_saved_gpus(WITH_HEAD)
    assert gpus == parse_saved_gpus(PLAIN)
    assert [gpu.index for gpu in gpus] == [1, 2, 0]
    assert gpus[0].total_bytes == 15360 << 20


def test_the_matrix_is_read_with_its_neighbours_left_out():
    kinds = parse_topology(TOPOLOGY)
    assert kinds == {(0, 1): "SYS", (1, 0): "SYS", (0, 2): "NV2", (2, 0): "NV2", (1, 2): "PHB", (2, 1): "PHB"}
    eight = ["\t" + "\t".join(f"GPU{i}" for i in range(12))]
    eight += ["\t".join([f"GPU{i}", *("X" if i == j else "NV12" for j in range(12))]) for i in range(12)]
    assert len(parse_topology("\n".join(eight))) == 12 * 11


def test_links_follow_the_slots_and_not_the_indices():
    links = build_links(parse_saved_gpus(PLAIN), parse_topology(TOPOLOGY), "node")
    rates = {(pair["source"], pair["target"]): pair["bandwidth_bytes_per_second"] for pair in links["pairs"]}
    usual = links["intra_host"]["bandwidth_bytes_per_second"]
    # slots in PCI order: GPU1, GPU2, GPU0
    assert rates.get(("node:1", "node:2"), usual) == pytest.approx(2 * 25e9 * 0.85)
    assert rates.get(("node:0", "node:2"), usual) == 9e9
    assert rates.get(("node:0", "node:1"), usual) == 1.2e10


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "empty"), ("index, name\n0, T4\n", "pci.bus_id"), (WITH_HEAD + "T4, 3\n", "too few"), ("a, b\n", "expected")],
)
def test_a_wrong_file_of_gpus_is_one_sentence(text, said):
    with pytest.raises(UserError, match=said):
        parse_saved_gpus(text)


def test_a_wrong_topology_is_one_sentence():
    with pytest.raises(UserError, match="no matrix"):
        parse_topology("Legend:\n  X = Self\n")
    with pytest.raises(UserError, match="'QPI'"):
        build_links(parse_saved_gpus(PLAIN), {(0, 1): "QPI"}, "node")


def test_the_command_writes_a_cluster_that_is_read_back(tmp_path, capsys):
    (tmp_path / "gpus.csv").write_text(WITH_HEAD)
    (tmp_path / "topo.txt").write_text(TOPOLOGY)
    settings = DetectConfig(host="far", gpus=str(tmp_path / "gpus.csv"), topology=str(tmp_path / "topo.txt"))
    assert detect.run(settings, tmp_path / "out") == 0
    found = OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(tmp_path / "out" / "cluster.yaml"))
    cluster = Cluster.from_config(OmegaConf.to_object(found))
    assert [device.type.name for device in cluster.devices] == ["t4", "t4", "v100"]
    assert cluster.link("far:1", "far:2").bandwidth_bytes_per_second == pytest.approx(42.5e9)
    with pytest.raises(UserError, match="gpus=FILE"):
        detect.run(DetectConfig(topology="x"), tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read"):
        detect.run(DetectConfig(gpus=str(tmp_path / "none")), tmp_path / "out")
