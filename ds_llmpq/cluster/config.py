"""Configuration groups `cluster` and `device`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DeviceTypeConfig:
    """One kind of device. Rates are per device, in FLOP/s and bytes/s; `source` says where they come from."""

    kind: str = "cuda"  # cuda | cpu
    memory_bytes: int = 0  # usable by one process after the runtime context
    memory_bandwidth_bytes_per_second: float = 0.0
    # dense matrix rate by dtype: float32, bfloat16, float16, int8; a device cannot compute in a dtype that is missing
    flops_per_second: dict[str, float] = field(default_factory=dict)
    kernel_overhead_seconds: float = 0.0  # fixed cost of one decoder layer's launch
    bits: list[int] = field(default_factory=lambda: [2, 3, 4, 8, 16])  # widths its kernels can run
    compute_capability: str | None = None
    source: str = "datasheet"


@dataclass
class DeviceConfig:
    """One device of a host: `slot` is its index in the hostfile's slots (PCI order on GPUs)."""

    type: str = ""
    slot: int = 0
    memory_bytes: int | None = None  # overrides the type's
    threads: int | None = None  # CPU stages: threads given to the process
    cpu_share: float | None = None  # CPU stages: emulates a slower processor, e.g. 0.5; null: all of it
    price_per_hour: float | None = None  # while it is used, in any currency


@dataclass
class HostConfig:
    name: str = "localhost"
    devices: list[DeviceConfig] = field(default_factory=list)
    price_per_hour: float | None = None  # while any of its devices is used, beside their own prices


@dataclass
class LinkConfig:
    latency_seconds: float = 0.0
    bandwidth_bytes_per_second: float = 0.0


@dataclass
class LinkPairConfig:
    """An exception for one ordered pair of devices, named `host:slot`."""

    source: str = ""
    target: str = ""
    latency_seconds: float = 0.0
    bandwidth_bytes_per_second: float = 0.0


@dataclass
class LinksConfig:
    intra_host: LinkConfig = field(default_factory=LinkConfig)
    inter_host: LinkConfig = field(default_factory=LinkConfig)
    pairs: list[LinkPairConfig] = field(default_factory=list)
    source: str = "datasheet"


@dataclass
class ClusterConfig:
    name: str = ""
    device_types: dict[str, DeviceTypeConfig] = field(default_factory=dict)
    hosts: list[HostConfig] = field(default_factory=list)
    links: LinksConfig = field(default_factory=LinksConfig)
    # environment passed to every host, e.g. GLOO_SOCKET_IFNAME
    env: dict[str, str] = field(default_factory=dict)


DETECTED = "auto"  # name of the cluster that is whatever this host has
