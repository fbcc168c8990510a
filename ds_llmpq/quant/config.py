"""Configuration group `quant`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class QuantConfig:
    """HQQ settings. `bits` are the widths the planner may choose from; 16 means unquantized in the compute type."""

    bits: list[int] = field(default_factory=lambda: [3, 4, 8, 16])
    group_size: int = 64
    axis: int = 1  # groups run along the input dimension (1) or the output dimension (0)
    optimize: bool = True  # HQQ's own fine-tuning of scale and zero
    # what runs decoder layers: auto | dequantize (HQQ's own forward) | openvino_graph (a stage as one, unquantized
    # layers too) | openvino | torch_int4 | gemlite
    kernel: str = "auto"
    # widths at which all weights of a row are one group, e.g. [8]; the others keep group_size
    whole_rows: list[int] = field(default_factory=list)
    # width of the output matrix; 16: as it is, and one with the embedding where the model ties them
    head_bits: int = 16
