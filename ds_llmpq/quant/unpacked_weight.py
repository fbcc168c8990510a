"""A quantized weight as plain numbers, from which each kernel builds its own layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hqq.core.quantize import HQQLinear, Quantizer


@dataclass(frozen=True)
class UnpackedWeight:
    """weight[o, i] = (codes[o, i] - zero[o, i // group_size]) x scale[o, i // group_size].

    codes: uint8 [out, in]; scale, zero: float32 [out, in / group_size].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_size: int

    @property
    def rounded_zero(self) -> torch.Tensor:
        """The zeros as bytes can hold them, in float32."""
        return self.zero.round().clamp_(0, 255)

    @property
    def has_whole_zeros(self) -> bool:
        return torch.equal(self.zero, self.rounded_zero)

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        groups = self.codes.float().view(*self.scale.shape, self.group_size)
        return ((groups - self.zero[..., None]) * self.scale[..., None]).view(self.codes.shape)


def unpack(linear: HQQLinear) -> UnpackedWeight:
    """Unpacks an `HQQLinear` with groups along its input (axis 1)."""
    meta = linear.meta
    shape, size = meta["shape"], meta["group_size"]
    groups = shape[0] * shape[1] // size
    rows = Quantizer.unpack[meta["packing"]](linear.W_q.data, dtype=torch.uint8)
    codes = rows[:groups].reshape(tuple(shape))  # at 3 bits HQQ pads the rows
    scale, zero = (meta[name].float().reshape(shape[0], shape[1] // size) for name in ("scale", "zero"))
    return UnpackedWeight(codes, scale, zero, size)


def stack(weights: Sequence[UnpackedWeight]) -> UnpackedWeight:
    """Stacks weights of one input, outputs in order."""
    if len(weights) == 1:
        return weights[0]
    codes, scale, zero = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scale", "zero"))
    return UnpackedWeight(codes, scale, zero, weights[0].group_size)
