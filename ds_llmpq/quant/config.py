"""Configuration group `quant`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ds_llmpq.errors import UserError

# names of settings in plans, profiles and quantized checkpoints of the former version, read for one more version
FORMER_NAMES = {"head_bits": "lm_head_bits", "whole_rows": "per_channel_bits"}
ZEROS = ("whole", "real")


@dataclass
class QuantConfig:
    """HQQ settings. `bits`: bit widths the planner may choose from; 16 means unquantized, in the compute dtype."""

    bits: list[int] = field(default_factory=lambda: [3, 4, 8, 16])
    group_size: int = 64
    axis: int = 1  # groups run along the input dimension (1) or the output dimension (0)
    optimize: bool = True  # fits scales and zeros to the weights; false: to the range of each group
    # runs the decoder layers: auto | dequantize (HQQ's own forward) | openvino_graph (a whole stage, unquantized layers
    # too) | openvino | humming (GPUs)
    kernel: str = "auto"
    # bit widths at which each row is one group, e.g. [8]; the others use group_size
    per_channel_bits: list[int] = field(default_factory=list)
    # bit width of lm_head; 16: unquantized, and shared with the embedding if the model ties them
    lm_head_bits: int = 16
    # of keys and values in the KV cache: 16 (the compute dtype), or 8 where stages are graphs (kernel openvino_graph)
    kv_bits: int = 16
    # zero points: whole (numbers: OpenVINO multiplies faster) | real (HQQ's own) | auto (whole where the kernel gains)
    zeros: str = "auto"


def resolve_zeros(quant: QuantConfig, kernel_gains: bool) -> QuantConfig:
    """`quant` with `auto` zeros replaced. `UserError`: no such zeros."""
    if quant.zeros not in ("auto", *ZEROS):
        raise UserError(f"quant.zeros={quant.zeros!r} is not known; use auto, whole or real.")
    return replace(quant, zeros="whole" if kernel_gains else "real") if quant.zeros == "auto" else quant


def suit_zeros(quant: QuantConfig, device: str) -> QuantConfig:
    """`quant` with `auto` zeros replaced where no kernel has been chosen: by those of the fastest on such a device."""
    return resolve_zeros(quant, device.startswith("cpu") and quant.axis == 1)


def rename_former(settings: Any, where: str | None = None) -> Any:
    """Settings from a file under their present names. `where`: the file, named in a note on stderr."""
    if not isinstance(settings, Mapping) or not FORMER_NAMES.keys() & settings.keys():
        return settings
    if where is not None:
        names = ", ".join(f"{former} ({now})" for former, now in FORMER_NAMES.items() if former in settings)
        print(
            f"note: {where} has former names of settings, which the next version will not read: {names}",
            file=sys.stderr,
        )
    return {FORMER_NAMES.get(name, name): value for name, value in settings.items()}
