"""The decisions of a plan alone: cuts, devices, bits and micro-batch sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageAssignment:
    """Layers [first, last) on one device, with one bit width a layer."""

    device: str
    first: int
    last: int
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """The decisions: stages in pipeline order, micro-batch sizes eta (prefill) and xi (decode)."""

    stages: tuple[StageAssignment, ...]
    prefill_micro_batch: int
    decode_micro_batch: int
