"""HQQ's optimization of zero points, fast enough for whole models on a CPU.

HQQ repeats `zero <- step(zero)` up to 20 times over the whole matrix, with about 15 temporaries of its size. Here the
same step runs over pieces that fit the CPU's cache, over-relaxed: `zero <- zero + 2 (step(zero) - zero)`, so that 4
steps get as far as 20. A group keeps its new zero only if its error became smaller.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hqq.core import optimize as hqq_optimize
from hqq.core.quantize import Quantizer

STEPS = 4
RELAXATION = 2.0
PIECE_WEIGHTS = 1 << 16  # 256 KiB in float32: the piece and its temporaries stay in the second-level cache
_PIECE_WEIGHTS_GPU = 1 << 26
_P, _BETA, _KAPPA = 0.7, 10.0, 1.01  # HQQ's own: norm of the error, sharpness of the shrinkage, its growth a step
_lock = threading.Lock()


@torch.inference_mode()
def optimize_zeros(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    min_max: list[float],
    axis: int = 0,
    device: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drop-in for HQQ's `optimize_weights_proximal`: (quantized [as tensor], scale, zero), unpacked, in float32.

    `tensor` holds groups along `axis`; scale (inverse, as HQQ works with it) and zero have size 1 there.
    """
    across = 1 - axis
    most = PIECE_WEIGHTS if tensor.device.type == "cpu" else _PIECE_WEIGHTS_GPU
    size = max(1, most // tensor.shape[axis])
    quantized, zeros = torch.empty_like(tensor), torch.empty_like(zero)
    for start in range(0, tensor.shape[across], size):
        length = min(size, tensor.shape[across] - start)
        piece, inverse, offset = (t.narrow(across, start, length).contiguous() for t in (tensor, scale, zero))
        found = _optimize_piece(piece, inverse, offset, min_max, axis)
        quantized.narrow(across, start, length).copy_(found[0])
        zeros.narrow(across, start, length).copy_(found[1])
    return quantized, scale, zeros


def _optimize_piece(
    weight: torch.Tensor, scale: torch.Tensor, first: torch.Tensor, min_max: list[float], axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    zero, beta, before = first, _BETA, None
    for _ in range(STEPS):
        restored, _, stepped, _ = hqq_optimize.optimize_weights_proximal_legacy_step(
            weight, scale, zero, min_max, beta, _P, axis
        )
        if before is None:
            before = _error(weight, restored, axis)
        zero = torch.lerp(zero, stepped, RELAXATION)
        beta *= _KAPPA
    quantized = _quantize(weight, scale, zero, min_max)
    worse = _error(weight, (quantized - zero) / scale, axis) > before
    if worse.any():
        zero = torch.where(worse, first, zero)
        quantized = _quantize(weight, scale, zero, min_max)
    return quantized, zero


def _quantize(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, min_max: list[float]) -> torch.Tensor:
    return (weight * scale).add_(zero).round_().clamp_(min_max[0], min_max[1])


def _error(weight: torch.Tensor, restored: torch.Tensor, axis: int) -> torch.Tensor:
    return (weight - restored).abs_().mean(axis, keepdim=True)


@contextmanager
def use_fast_optimizer() -> Iterator[None]:
    """Makes HQQ's quantizer use `optimize_zeros` within the block. It reads its optimizer from a class attribute."""
    with _lock:
        previous = Quantizer.__dict__["optimize_weights"]
        Quantizer.optimize_weights = optimize_zeros
        try:
            yield
        finally:
            Quantizer.optimize_weights = previous
