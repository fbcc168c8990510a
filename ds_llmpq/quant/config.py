"""Configuration group `quant`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Names that these settings had in the former version, in plans, profiles and quantized checkpoints: read once more.
FORMER_NAMES = {"head_bits": "lm_head_bits", "whole_rows": "per_channel_bits"}


@dataclass
class QuantConfig:
    """HQQ settings. `bits` are the widths the planner may choose from; 16 means unquantized in the compute dtype."""

    bits: list[int] = field(default_factory=lambda: [3, 4, 8, 16])
    group_size: int = 64
    axis: int = 1  # groups run along the input dimension (1) or the output dimension (0)
    optimize: bool = True  # HQQ's own fine-tuning of scale and zero
    # what runs decoder layers: auto | dequantize (HQQ's own forward) | openvino_graph (a stage as one, unquantized
    # layers too) | openvino
    kernel: str = "auto"
    # widths at which all weights of a row are one group, e.g. [8]; the others keep group_size
    per_channel_bits: list[int] = field(default_factory=list)
    # width of lm_head; 16: as it is, and one with the embedding where the model ties them
    lm_head_bits: int = 16


def rename_former(settings: Any, where: str | None = None) -> Any:
    """The settings that a file noted, by their present names. `where`: the file, for a line on stderr that says so."""
    if not isinstance(settings, Mapping) or not FORMER_NAMES.keys() & settings.keys():
        return settings
    if where is not None:
        names = ", ".join(f"{former} ({now})" for former, now in FORMER_NAMES.items() if former in settings)
        print(
            f"note: {where} has former names of settings, which the next version will not read: {names}",
            file=sys.stderr,
        )
    return {FORMER_NAMES.get(name, name): value for name, value in settings.items()}
