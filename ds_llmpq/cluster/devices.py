"""Device types, devices and links as plain values; no files, no frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

BIT_WIDTHS = (1, 2, 3, 4, 8, 16)  # 16: unquantized, in the compute dtype
KINDS = ("cuda", "cpu")
COMPUTE_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}  # name -> bytes of one element
RATE_DTYPES = (*COMPUTE_DTYPES, "int8")


@dataclass(frozen=True)
class DeviceType:
    """One kind of device. Rates in FLOP/s and bytes/s; for `cpu` they are those of one thread."""

    name: str
    kind: str
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    flops_per_second: Mapping[str, float]  # by compute dtype; it cannot compute in a missing one
    kernel_overhead_seconds: float
    bits: tuple[int, ...]
    compute_capability: str | None
    source: str

    def with_threads(self, threads: int, cpu_share: float = 1.0) -> DeviceType:
        """The type of `threads` CPU threads that run `cpu_share` of the time, with a name of its own.

        Rates grow linearly: if threads share a memory bus, a type states the bandwidth of one while all are busy.
        """
        if self.kind != "cpu" or (threads == 1 and cpu_share == 1.0):
            return self
        name = self.name + (f"_x{threads}" if threads != 1 else "")
        rate = threads * cpu_share
        return replace(
            self,
            name=name + (f"_share{100 * cpu_share:g}" if cpu_share != 1.0 else ""),
            memory_bandwidth_bytes_per_second=self.memory_bandwidth_bytes_per_second * rate,
            flops_per_second={dtype: peak * rate for dtype, peak in self.flops_per_second.items()},
            kernel_overhead_seconds=self.kernel_overhead_seconds / cpu_share,
        )


@dataclass(frozen=True)
class Device:
    """One device of a host; `slot` is its index among the host's hostfile slots."""

    host: str
    slot: int
    type: DeviceType  # with this device's threads
    memory_bytes: int
    threads: int | None = None  # of a CPU stage
    cpu_share: float | None = None  # of a CPU stage that emulates a slower processor

    @property
    def name(self) -> str:
        return f"{self.host}:{self.slot}"


@dataclass(frozen=True)
class Link:
    """From one device to another: seconds = latency + bytes / bandwidth."""

    latency_seconds: float
    bandwidth_bytes_per_second: float

    @property
    def seconds_per_byte(self) -> float:
        return 1.0 / self.bandwidth_bytes_per_second

    def seconds(self, size_bytes: float) -> float:
        return self.latency_seconds + size_bytes * self.seconds_per_byte


@dataclass(frozen=True)
class Links:
    intra_host: Link | None  # None where no host has two devices
    inter_host: Link | None  # None where there is one host
    pairs: Mapping[tuple[str, str], Link]
    source: str
