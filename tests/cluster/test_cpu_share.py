"""Shares of a processor: names, rates and mistakes."""

import pytest

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig
from ds_llmpq.errors import UserError


def cluster(*devices, kind="cpu"):
    config = ClusterConfig(name="uneven")
    config.device_types = {"core": DeviceTypeConfig(kind, 1 << 30, 2e10, {"float32": 1e11}, 1e-4)}
    config.hosts = [HostConfig("localhost", list(devices))]
    config.links.intra_host = LinkConfig(1e-5, 1e10)
    return Cluster.from_config(config)


def test_a_share_makes_a_slower_type_of_its_own():
    shares = (
        DeviceConfig("core", 0),
        DeviceConfig("core", 1, cpu_share=0.25, threads=2),
        DeviceConfig("core", 2, cpu_share=1.0),
    )
    whole, quarter, same = cluster(*shares).devices
    assert (whole.type.name, quarter.type.name, same.type.name) == ("core", "core_x2_share25", "core")
    assert quarter.type.flops_per_second["float32"] == 2 * 0.25 * 1e11
    assert quarter.type.memory_bandwidth_bytes_per_second == 2 * 0.25 * 2e10
    assert quarter.type.kernel_overhead_seconds == 4e-4
    assert (quarter.cpu_share, whole.cpu_share) == (0.25, None)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_within_bounds(share):
    with pytest.raises(UserError, match=r"cpu_share is .* from 0\.05 to 1"):
        cluster(DeviceConfig("core", 0, cpu_share=share))


def test_a_gpu_has_no_share():
    with pytest.raises(UserError, match="remove cpu_share"):
        cluster(DeviceConfig("core", 0, cpu_share=0.5), kind="cuda")
