"""torch's tensors as OpenVINO's, on the same memory."""

from __future__ import annotations

from typing import NamedTuple

import openvino
import torch


class Kind(NamedTuple):
    """OpenVINO's names for a dtype in tensors and properties, and a dtype with which numpy can view it."""

    ours: openvino.Type
    theirs: str
    as_numpy: torch.dtype


KINDS = {
    torch.bfloat16: Kind(openvino.Type.bf16, "bf16", torch.int16),
    torch.float32: Kind(openvino.Type.f32, "f32", torch.float32),
    torch.uint8: Kind(openvino.Type.u8, "u8", torch.uint8),
}


def share(memory: torch.Tensor) -> openvino.Tensor:
    """An OpenVINO tensor on the same memory, which must outlive it."""
    kind = KINDS[memory.dtype]
    return openvino.Tensor(memory.view(kind.as_numpy).numpy(), openvino.Shape(list(memory.shape)), kind.ours)
