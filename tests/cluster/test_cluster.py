"""Clusters made from configurations: what they hold, and one clear sentence for every mistake."""

import copy

import pytest

from ds_llmpq.cluster.cluster import Cluster, choose_dtype, gate, list_feasible_bits
from ds_llmpq.cluster.config import (
    ClusterConfig,
    DeviceConfig,
    DeviceTypeConfig,
    HostConfig,
    LinkConfig,
    LinkPairConfig,
)
from ds_llmpq.errors import UserError

GIB = 1 << 30


def gpu(**changes):
    rates = {"float16": 6e13, "float32": 8e12}
    fields = {"memory_bytes": 16 * GIB, "memory_bandwidth_bytes_per_second": 3e11, "flops_per_second": rates}
    return DeviceTypeConfig(**{**fields, **changes})


def cpu(**changes):
    rates = {"bfloat16": 2e11, "float32": 1e11}
    return gpu(**{"kind": "cpu", "memory_bytes": 0, "flops_per_second": rates, **changes})


def config():
    """Host a: two GPUs; host b: one CPU device with two threads."""
    result = ClusterConfig(name="mix", device_types={"t4": gpu(), "core": cpu(bits=[16, 4, 8])})
    result.hosts = [
        HostConfig("a", [DeviceConfig("t4", 0), DeviceConfig("t4", 1, memory_bytes=5 * GIB)]),
        HostConfig("b", [DeviceConfig("core", 0, memory_bytes=GIB, threads=2)]),
    ]
    result.links.intra_host = LinkConfig(1e-5, 1e10)
    result.links.inter_host = LinkConfig(1e-4, 1e9)
    result.links.pairs = [LinkPairConfig("a:0", "b:0", 1e-3, 1e6)]
    return result


def test_devices_links_and_types():
    cluster = Cluster.from_config(config())
    assert [device.name for device in cluster.devices] == ["a:0", "a:1", "b:0"]
    assert [device.memory_bytes for device in cluster.devices] == [16 * GIB, 5 * GIB, GIB]
    assert cluster.link("a:0", "a:1").bandwidth_bytes_per_second == 1e10
    assert cluster.link("b:0", "a:0").seconds(1e9) == pytest.approx(1.0001)
    assert cluster.link("a:0", "b:0").seconds_per_byte == pytest.approx(1e-6)
    with pytest.raises(UserError, match="not in cluster mix"):
        cluster.device("c:0")


def test_cpu_rates_grow_with_threads_under_a_name_of_their_own():
    cluster = Cluster.from_config(config())
    core = cluster.device("b:0").type
    assert set(cluster.device_types) == {"t4", "core_x2"}
    assert core.flops_per_second["bfloat16"] == 4e11
    assert core.memory_bandwidth_bytes_per_second == 6e11
    changed = config()
    changed.hosts[1].devices[0].threads = None
    one = Cluster.from_config(changed).device("b:0")
    assert (one.type.name, one.threads, one.type.flops_per_second["float32"]) == ("core", 1, 1e11)


def test_links_are_asked_for_only_where_there_are_any():
    single = config()
    single.hosts = single.hosts[1:]
    single.links = type(single.links)()
    cluster = Cluster.from_config(single)
    assert cluster.links.intra_host is cluster.links.inter_host is None
    with pytest.raises(UserError, match="one and the same"):
        cluster.link("b:0", "b:0")


def change(path, value):
    """A copy of the configuration with the attribute at dotted `path` replaced; digits index lists."""
    result = config()
    *steps, last = path.split(".")
    target = result
    for step in steps:
        target = (
            target[int(step)] if step.isdigit() else target[step] if isinstance(target, dict) else getattr(target, step)
        )
    if isinstance(target, dict):
        target[last] = value
    else:
        setattr(target, last, value)
    return result


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("hosts", [], "no devices"),
        ("hosts", [HostConfig("a", [])], "no devices"),
        ("hosts.0.devices.0.type", "t5", "unknown type 't5'.*t4, core"),
        ("hosts.1.name", "a", "host a is listed twice"),
        ("hosts.1.name", "a:b", "not usable"),
        ("hosts.0.devices.1.slot", 0, "device a:0 is listed twice"),
        ("hosts.0.devices.1.slot", -1, "negative slot"),
        ("hosts.0.devices.1.memory_bytes", 0, "memory_bytes is 0; it must be positive"),
        ("hosts.1.devices.0.memory_bytes", None, "memory_bytes is 0"),
        ("hosts.1.devices.0.threads", 0, "threads is 0"),
        ("hosts.0.devices.0.threads", 2, "remove threads"),
        ("device_types.t4.kind", "tpu", "one of cuda, cpu"),
        ("device_types.t4.memory_bandwidth_bytes_per_second", 0.0, "must be positive"),
        ("device_types.t4.memory_bandwidth_bytes_per_second", float("nan"), "finite"),
        ("device_types.t4.kernel_overhead_seconds", -1.0, "at least 0"),
        ("device_types.t4.flops_per_second", {}, "needs a rate"),
        ("device_types.t4.flops_per_second", {"int8": 1e12}, "needs a rate"),
        ("device_types.t4.flops_per_second", {"fp16": 1e12}, "'fp16'.*bfloat16, float16, float32, int8"),
        ("device_types.t4.flops_per_second", {"float16": -1.0}, "must be positive"),
        ("device_types.t4.bits", [5], "has 5"),
        ("device_types.t4.bits", [], "bits is empty"),
        ("links.intra_host.bandwidth_bytes_per_second", 0.0, "links.intra_host.*positive"),
        ("links.inter_host.latency_seconds", -1.0, "at least 0"),
        ("links.pairs.0.target", "b:1", "'b:1', which the cluster lacks"),
        ("links.pairs.0.bandwidth_bytes_per_second", 0.0, "a:0 to b:0.*positive"),
    ],
)
def test_mistakes(path, value, words):
    with pytest.raises(UserError, match=words):
        Cluster.from_config(change(path, value))


def test_doubled_pair():
    doubled = config()
    doubled.links.pairs.append(copy.copy(doubled.links.pairs[0]))
    with pytest.raises(UserError, match="a:0 to b:0 twice"):
        Cluster.from_config(doubled)


def test_gates():
    cluster = Cluster.from_config(config())
    t4, core = cluster.device_types.values()
    assert list_feasible_bits(core) == (4, 8, 16)
    assert list_feasible_bits(t4, "bfloat16") == ()
    assert list_feasible_bits(t4, "float16") == (2, 3, 4, 8, 16)
    assert gate(core, 4) is None
    assert "no kernel for 3 bits" in gate(core, 3)
    assert "does not compute in bfloat16" in gate(t4, 4, "bfloat16")


def test_common_dtype():
    mixed = Cluster.from_config(config())
    assert choose_dtype(mixed) == "float32"
    with pytest.raises(UserError, match=r"t4 does not compute in bfloat16.*float16, float32"):
        choose_dtype(mixed, "bfloat16")
    with pytest.raises(UserError, match="'fp8' is not known"):
        choose_dtype(mixed, "fp8")
    alone = config()
    alone.hosts, alone.links.pairs = alone.hosts[:1], []
    assert choose_dtype(Cluster.from_config(alone)) == "float16"
    apart = change("device_types.core.flops_per_second", {"bfloat16": 1.0})
    with pytest.raises(UserError, match="share no compute dtype"):
        choose_dtype(Cluster.from_config(apart))


def test_prices_are_of_devices_and_their_hosts():
    result = config()
    hosts = result.hosts
    assert Cluster.from_config(result).sum_prices([f"{hosts[0].name}:{hosts[0].devices[0].slot}"]) is None
    hosts[0].price_per_hour = 2.0
    hosts[0].devices[0].price_per_hour = 0.5
    for host in hosts[1:]:
        for device in host.devices:
            device.price_per_hour = 0.25
    cluster = Cluster.from_config(result)
    own = [f"{host.name}:{device.slot}" for host in hosts for device in host.devices]
    assert cluster.sum_prices(own[:1]) == 2.5
    others = sum(len(host.devices) for host in hosts[1:])
    assert cluster.sum_prices(own) == 2.5 + 0.25 * others
    hosts[0].price_per_hour = None
    with pytest.raises(UserError, match=rf"^device {own[1]} has no price_per_hour, but others have"):
        Cluster.from_config(result)
    hosts[0].devices[0].price_per_hour = -1.0
    with pytest.raises(UserError, match=rf"price_per_hour of {own[0]} is -1.0; it must be at least 0"):
        Cluster.from_config(result)
