"""A cluster: the devices of its hosts and the links between them, checked once when it is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig, LinksConfig
from ds_llmpq.cluster.devices import BIT_WIDTHS, COMPUTE_DTYPES, KINDS, RATE_DTYPES, Device, DeviceType, Link, Links
from ds_llmpq.cluster.hostfile import check_host_name
from ds_llmpq.errors import UserError, make_printable, quote
from ds_llmpq.validation import validate

MOST_DEVICES = 4096
MOST_SLOTS = 4096  # of a host, and threads of a device
MOST = 1e30  # bytes, FLOP/s and seconds: products of a few stay finite


@dataclass(frozen=True)
class Cluster:
    name: str
    devices: tuple[Device, ...]  # in the order of the configuration
    links: Links
    env: Mapping[str, str]
    prices: Mapping[str, float] = field(default_factory=dict)  # an hour, of hosts and devices by name; empty: unknown

    @classmethod
    def from_config(cls, config: ClusterConfig) -> Cluster:
        """UserError: no devices, an unknown type, a repeated host or slot, or a number out of range."""
        validate(ClusterConfig, asdict(config), "cluster", "correct it there")  # a configuration's mappings are untyped
        _check_name("cluster name", config.name)
        types = {name: device_type(name, entry) for name, entry in config.device_types.items()}
        for host, times in Counter(host.name for host in config.hosts).items():
            check_host_name(host)
            if times > 1:
                raise UserError(f"host {host} is listed twice; list each host once, with all of its devices")
        devices = tuple(_build_device(host.name, entry, types) for host in config.hosts for entry in host.devices)
        if not devices:
            raise UserError(f"cluster {config.name or '(unnamed)'} has no devices; list hosts with their devices")
        if len(devices) > MOST_DEVICES:
            raise UserError(
                f"cluster {config.name} has {len(devices)} devices, but at most {MOST_DEVICES} are planned for"
            )
        for name, times in Counter(device.name for device in devices).items():
            if times > 1:
                raise UserError(f"device {name} is listed twice; give each device of a host its own slot")
        return cls(config.name, devices, _build_links(config.links, devices), dict(config.env), _list_prices(config))

    @property
    def device_types(self) -> dict[str, DeviceType]:
        """Types in use by name; CPU devices with different thread counts are different types."""
        return {device.type.name: device.type for device in self.devices}

    def device(self, name: str) -> Device:
        for device in self.devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in self.devices)
        raise UserError(f"device {name} is not in cluster {self.name}; it has {known}")

    def sum_prices(self, names: Iterable[str]) -> float | None:
        """What these devices and their hosts cost per hour; None if the cluster has no prices."""
        names = list(names)
        hosts = {self.device(name).host for name in names}
        return sum(self.prices.get(name, 0.0) for name in {*names, *hosts}) if self.prices else None

    def link(self, source: str, target: str) -> Link:
        """From device `source` to device `target`, both as host:slot."""
        if (source, target) in self.links.pairs:
            return self.links.pairs[source, target]
        same_host = self.device(source).host == self.device(target).host
        link = self.links.intra_host if same_host else self.links.inter_host
        if link is None:
            raise UserError(f"no link is known from {source} to {target}; these are one and the same device")
        return link


def device_type(name: str, config: DeviceTypeConfig) -> DeviceType:
    """A checked device type. UserError names the type, the field and its bound."""
    _check_name("device type", name)
    where = f"device type {name}"
    if config.kind not in KINDS:
        raise UserError(f"{where} has kind {config.kind!r}; it must be one of {', '.join(KINDS)}")
    _check_number(f"{where}: memory_bytes", config.memory_bytes, lowest=0)
    _check_number(f"{where}: memory_bandwidth_bytes_per_second", config.memory_bandwidth_bytes_per_second)
    _check_number(f"{where}: kernel_overhead_seconds", config.kernel_overhead_seconds, lowest=0)
    _check_choices(f"{where}: flops_per_second", config.flops_per_second, RATE_DTYPES)
    if not set(config.flops_per_second) & set(COMPUTE_DTYPES):
        raise UserError(f"{where}: flops_per_second needs a rate for one of {', '.join(COMPUTE_DTYPES)}")
    for dtype, rate in config.flops_per_second.items():
        _check_number(f"{where}: flops_per_second.{dtype}", rate)
    _check_choices(f"{where}: bits", config.bits, BIT_WIDTHS)
    if not config.bits:
        raise UserError(f"{where}: bits is empty; list the widths it can run, of {', '.join(map(str, BIT_WIDTHS))}")
    return DeviceType(
        name=name,
        kind=config.kind,
        memory_bytes=int(config.memory_bytes),
        memory_bandwidth_bytes_per_second=float(config.memory_bandwidth_bytes_per_second),
        flops_per_second={dtype: float(rate) for dtype, rate in config.flops_per_second.items()},
        kernel_overhead_seconds=float(config.kernel_overhead_seconds),
        bits=tuple(bits for bits in BIT_WIDTHS if bits in config.bits),
        compute_capability=config.compute_capability,
        source=make_printable(config.source, 2_000, keep=""),
    )


def _build_device(host: str, config: Any, types: Mapping[str, DeviceType]) -> Device:
    where = f"device {host}:{config.slot}"
    if config.type not in types:
        known = ", ".join(types) or "none"
        raise UserError(
            f"{where} has unknown type {config.type!r}; device_types has {known}; describe it there, or name one of "
            "conf/device, such as a100_80 or rtx_4090"
        )
    kind = types[config.type]
    if config.slot < 0:
        raise UserError(f"{where} has a negative slot; slots count from 0")
    if config.slot >= MOST_SLOTS or (config.threads or 0) > MOST_SLOTS:
        raise UserError(
            f"{where}: slot and threads must be at most {MOST_SLOTS}, but are {config.slot}, {config.threads}"
        )
    for name in ("threads", "cpu_share") if kind.kind != "cpu" else ():
        if (value := getattr(config, name)) is not None:
            raise UserError(f"{where} sets {name}={value}, but its type is {kind.kind}; remove {name}")
    threads = None if kind.kind != "cpu" else 1 if config.threads is None else config.threads
    if threads is not None:
        _check_number(f"{where}: threads", threads)
    if config.cpu_share is not None and not 0.05 <= config.cpu_share <= 1.0:
        raise UserError(f"{where}: cpu_share is {config.cpu_share}; it must be from 0.05 to 1")
    memory = kind.memory_bytes if config.memory_bytes is None else config.memory_bytes
    _check_number(f"{where}: memory_bytes", memory)
    whole = kind.with_threads(threads or 1, config.cpu_share or 1.0)
    return Device(host, config.slot, whole, int(memory), threads, config.cpu_share)


def _list_prices(config: ClusterConfig) -> dict[str, float]:
    """Prices by host or device (host:slot). `UserError`: some devices have a price and others none."""
    found: dict[str, float] = {}
    unpriced = []
    for host in config.hosts:
        entries: list[tuple[str, HostConfig | DeviceConfig]] = [(host.name, host)]
        entries += [(f"{host.name}:{device.slot}", device) for device in host.devices]
        for name, entry in entries:
            if entry.price_per_hour is not None:
                _check_number(f"price_per_hour of {name}", entry.price_per_hour, lowest=0)
                found[name] = float(entry.price_per_hour)
            elif host.price_per_hour is None and entry is not host:
                unpriced.append(name)
    if found and unpriced:
        raise UserError(
            f"device {unpriced[0]} has no price_per_hour, but others have; give it or its host one, or none"
        )
    return found


def _build_links(config: LinksConfig, devices: tuple[Device, ...]) -> Links:
    hosts = [device.host for device in devices]
    several_hosts, shared_host = len(set(hosts)) > 1, len(set(hosts)) < len(hosts)
    pairs: dict[tuple[str, str], Link] = {}
    names = {device.name for device in devices}
    for entry in config.pairs:
        pair = (entry.source, entry.target)
        for name in pair:
            if name not in names:
                raise UserError(f"links.pairs names device {name!r}, which the cluster lacks; devices are host:slot")
        if pair in pairs:
            raise UserError(f"links.pairs lists {entry.source} to {entry.target} twice; list each direction once")
        link = LinkConfig(entry.latency_seconds, entry.bandwidth_bytes_per_second)
        pairs[pair] = _build_link(f"links.pairs {entry.source} to {entry.target}", link)
    return Links(
        intra_host=_build_link("links.intra_host", config.intra_host) if shared_host else None,
        inter_host=_build_link("links.inter_host", config.inter_host) if several_hosts else None,
        pairs=pairs,
        source=make_printable(config.source, 2_000, keep=""),
    )


def _build_link(where: str, config: LinkConfig) -> Link:
    _check_number(f"{where}: latency_seconds", config.latency_seconds, lowest=0)
    _check_number(f"{where}: bandwidth_bytes_per_second", config.bandwidth_bytes_per_second)
    return Link(float(config.latency_seconds), float(config.bandwidth_bytes_per_second))


def _check_number(where: str, value: float, lowest: float | None = None) -> None:
    """Positive without `lowest`, else at least that; never infinite."""
    if not abs(value) <= MOST or (value <= 0 if lowest is None else value < lowest):
        bound = "positive" if lowest is None else f"at least {lowest}"
        raise UserError(f"{where} is {quote(value)}; it must be {bound} and at most {MOST:g}")


def _check_name(what: str, name: str) -> None:
    if len(name) > 200 or make_printable(name, keep="") != name:
        raise UserError(f"{what} is {quote(name)}; it must be at most 200 characters, no control characters among them")


def _check_choices(where: str, values: Iterable[Any], allowed: tuple[Any, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise UserError(f"{where} has {value!r}; it must be one of {', '.join(map(str, allowed))}")


def gate(device_type: DeviceType, bits: int, dtype: str | None = None) -> str | None:
    """Why `device_type` cannot run a layer at `bits` in the compute dtype (None: in any); None if it can."""
    if bits not in device_type.bits:
        return f"{device_type.name} has no kernel for {bits} bits (its widths: {', '.join(map(str, device_type.bits))})"
    if dtype is not None and dtype not in device_type.flops_per_second:
        return f"{device_type.name} does not compute in {dtype} (it does in {', '.join(device_type.flops_per_second)})"
    return None


def list_feasible_bits(device_type: DeviceType, dtype: str | None = None) -> tuple[int, ...]:
    """The bit widths, ascending, that `gate` lets through."""
    return tuple(bits for bits in device_type.bits if gate(device_type, bits, dtype) is None)


def choose_dtype(cluster: Cluster, requested: str = "auto") -> str:
    """The compute dtype of a pipeline: `requested`, or for "auto" the one in which the slowest device is fastest.

    Hidden states pass from stage to stage, so all stages compute in one dtype. UserError: an unknown dtype, a device
    type that lacks it, or no dtype that all share.
    """
    types = cluster.device_types.values()
    if requested == "auto":
        shared = [name for name in COMPUTE_DTYPES if all(name in entry.flops_per_second for entry in types)]
        if not shared:
            raise UserError("the cluster's device types share no compute dtype; remove one of them or add its rates")
        return max(shared, key=lambda name: min(entry.flops_per_second[name] for entry in types))
    if requested not in COMPUTE_DTYPES:
        raise UserError(f"dtype {requested!r} is not known; use auto or one of {', '.join(COMPUTE_DTYPES)}")
    for entry in types:
        if requested not in entry.flops_per_second:
            has = ", ".join(name for name in entry.flops_per_second if name in COMPUTE_DTYPES)
            raise UserError(f"device type {entry.name} does not compute in {requested}; use dtype auto or one of {has}")
    return requested
