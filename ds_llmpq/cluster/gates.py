"""Capability gates: in which arithmetic type, and at which bit widths, a device can run a layer."""

from __future__ import annotations

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.devices import COMPUTE_DTYPES, DeviceType
from ds_llmpq.errors import UserError


def gate(device_type: DeviceType, bits: int, dtype: str | None = None) -> str | None:
    """Why `device_type` cannot run a layer at `bits` computing in `dtype` (None: in any), or None where it can."""
    if bits not in device_type.bits:
        return f"{device_type.name} has no kernel for {bits} bits (its widths: {', '.join(map(str, device_type.bits))})"
    if dtype is not None and dtype not in device_type.flops_per_second:
        return f"{device_type.name} does not compute in {dtype} (it does in {', '.join(device_type.flops_per_second)})"
    return None


def list_feasible_bits(device_type: DeviceType, dtype: str | None = None) -> tuple[int, ...]:
    """Bit widths, ascending, that pass the gate."""
    return tuple(bits for bits in device_type.bits if gate(device_type, bits, dtype) is None)


def choose_dtype(cluster: Cluster, requested: str = "auto") -> str:
    """The one compute type of a pipeline: `requested`, or for "auto" the type whose slowest device is fastest.

    Hidden states cross from stage to stage, so all stages compute in one type. UserError: unknown type, a device that
    lacks it, or no type that all devices share.
    """
    types = cluster.device_types.values()
    if requested == "auto":
        shared = [name for name in COMPUTE_DTYPES if all(name in entry.flops_per_second for entry in types)]
        if not shared:
            raise UserError("the cluster's device types share no compute type; remove one of them or add its rates")
        return max(shared, key=lambda name: min(entry.flops_per_second[name] for entry in types))
    if requested not in COMPUTE_DTYPES:
        raise UserError(f"dtype {requested!r} is not known; use auto or one of {', '.join(COMPUTE_DTYPES)}")
    for entry in types:
        if requested not in entry.flops_per_second:
            has = ", ".join(name for name in entry.flops_per_second if name in COMPUTE_DTYPES)
            raise UserError(f"device type {entry.name} does not compute in {requested}; use dtype auto or one of {has}")
    return requested
