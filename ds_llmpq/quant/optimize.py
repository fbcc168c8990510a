"""Scales and zero points fitted to the weights, fast enough for whole models on a CPU: over pieces that fit its cache.

*Real zeros*: HQQ repeats `zero <- step(zero)` up to 20 times over the whole matrix, with about 15 temporaries of its
size. Here the same step is over-relaxed: `zero <- zero + 2 (step(zero) - zero)`, so that 4 steps get as far as 20. A
group keeps its new zero only if its error became smaller.

*Whole zeros*: a zero can only be rounded, so the scale is searched. A narrower range clips the largest weights and
keeps the others more exactly; of a few ranges each group takes the one with the least squared error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hqq.core import optimize as hqq_optimize
from hqq.core.quantize import Quantizer

RANGES = 8
_MOST_STEPS = 1e6  # bound of the inverse scale, for groups without a range
STEPS = 4
RELAXATION = 2.0
PIECE_WEIGHTS = 1 << 16  # 256 KiB in float32: the piece and its temporaries stay in the second-level cache
_PIECE_WEIGHTS_GPU = 1 << 26
_P, _BETA, _KAPPA = 0.7, 10.0, 1.01  # HQQ's own: norm of the error, sharpness of the shrinkage, its growth a step
_lock = threading.Lock()


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes, inverse scale, zero


def optimize_zeros(tensor, scale, zero, min_max, axis=0, device=None) -> Parts:
    """Drop-in for HQQ's `optimize_weights_proximal`: (quantized [as tensor], scale, zero), unpacked, in float32.

    `tensor` holds groups along `axis`; scale (inverse, as HQQ works with it) and zero have size 1 there.
    """
    return _fit_pieces(_optimize_piece, tensor, scale, zero, min_max, axis)


def search_whole(tensor, scale, zero, min_max, axis=0, device=None) -> Parts:
    """Like `optimize_zeros`, with zeros among the codes and scales of least squared error."""
    return _fit_pieces(_search_piece, tensor, scale, zero, min_max, axis)


@torch.inference_mode()
def _fit_pieces(
    fit: Callable[..., Parts], tensor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, min_max: list[float],
    axis: int,
) -> Parts:  # fmt: skip
    across = 1 - axis
    most = PIECE_WEIGHTS if tensor.device.type == "cpu" else _PIECE_WEIGHTS_GPU
    size = max(1, most // tensor.shape[axis])
    fitted = torch.empty_like(tensor), torch.empty_like(scale), torch.empty_like(zero)
    for start in range(0, tensor.shape[across], size):
        length = min(size, tensor.shape[across] - start)
        pieces = (given.narrow(across, start, length).contiguous() for given in (tensor, scale, zero))
        for whole, piece in zip(fitted, fit(*pieces, min_max, axis), strict=True):
            whole.narrow(across, start, length).copy_(piece)
    return fitted


def _optimize_piece(
    weight: torch.Tensor, scale: torch.Tensor, first: torch.Tensor, min_max: list[float], axis: int
) -> Parts:
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
    return quantized, scale, zero


def _search_piece(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, min_max: list[float], axis: int
) -> Parts:
    top = min_max[1]
    low = weight.amin(axis, keepdim=True).clamp_(max=0.0)
    steps = top / (weight.amax(axis, keepdim=True).clamp_(min=0.0) - low).clamp_(min=top / _MOST_STEPS)
    zero = (-low * steps).round_().clamp_(0.0, top)
    best, scale = torch.full_like(steps, torch.inf), steps
    for part in torch.linspace(1.0, 1.0 - (top + 1) ** -0.5, RANGES).tolist():
        tried = steps / part
        codes = _quantize(weight, tried, zero, min_max).sub_(zero)
        product, square = ((codes * other).sum(axis, keepdim=True) for other in (weight, codes))
        tried = torch.where(product > 0.0, square / product, tried)  # the least squares of these codes
        error = codes.div_(tried).sub_(weight).square_().sum(axis, keepdim=True)
        best, scale = torch.where(error < best, error, best), torch.where(error < best, tried, scale)
    return _quantize(weight, scale, zero, min_max), scale, zero


def _quantize(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, min_max: list[float]) -> torch.Tensor:
    return (weight * scale).add_(zero).round_().clamp_(min_max[0], min_max[1])


def _error(weight: torch.Tensor, restored: torch.Tensor, axis: int) -> torch.Tensor:
    return (weight - restored).abs_().mean(axis, keepdim=True)


@contextmanager
def use_optimizer(optimizer: Callable[..., Parts]) -> Iterator[None]:
    """Makes HQQ's quantizer use `optimizer` within the block. It reads its optimizer from a class attribute."""
    with _lock:
        previous = Quantizer.__dict__["optimize_weights"]
        Quantizer.optimize_weights = optimizer
        try:
            yield
        finally:
            Quantizer.optimize_weights = previous
