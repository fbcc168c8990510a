"""Makes sensitivity.json with one of the methods, and records what it took: times, memory, text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.corpus import read_calibration_texts, select_rows
from ds_llmpq.models.description import refuse_quantized
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.quant.config import QuantConfig, suit_zeros
from ds_llmpq.quant.packing import (
    UNQUANTIZED_BITS,
    check_lm_head,
    find_lm_head_problem,
    find_quantization_problem,
    make_groups,
)
from ds_llmpq.sensitivity import indicators
from ds_llmpq.sensitivity.config import CalibrationConfig
from ds_llmpq.sensitivity.layerwise import Layerwise, LossIncrease, measure, peak_memory_bytes
from ds_llmpq.sensitivity.resume import Progress
from ds_llmpq.sensitivity.table import Sensitivity
from ds_llmpq.validation import check_least

METHODS = ("variance", "hessian", "random", "measured")
_LITTLE_LOSS = 0.2  # nats per token, up to which losses of different texts behave alike


@dataclass
class SensitivityRequest:
    """What `make_sensitivity` is to do. `on_layer(phase, done, total)` is called after each layer."""

    model_path: Path
    method: str
    quant: QuantConfig
    calibration: CalibrationConfig
    seed: int
    device: torch.device
    folder: Path  # for the progress from which a killed run resumes
    on_layer: Callable[[str, int, int], None] = lambda phase, done, total: None
    trust_remote_code: bool = False


def make_sensitivity(request: SensitivityRequest) -> Sensitivity:
    """`UserError`: an unknown method, too short a text, or a model that is already quantized or cannot be quantized to
    one of the widths."""
    if request.method not in METHODS:
        raise UserError(f"method={request.method!r} is unknown; the methods are {', '.join(METHODS)}.")
    calibration, quant = request.calibration, suit_zeros(request.quant, request.device.type)
    refuse_quantized(request.model_path)
    check_least("calibration", calibration, rows=1, tokens=1, rows_at_once=1, state_bytes=0, hessian_rows=1)
    texts = read_calibration_texts(calibration.text)
    text_hash = hashlib.sha256("".join(text.sha256 for text in texts).encode()).hexdigest()
    tokenizer = load_tokenizer(str(request.model_path), request.trust_remote_code)
    tokens, kinds = select_rows(texts, tokenizer, calibration.rows, calibration.tokens)
    checkpoint = Checkpoint(request.model_path, request.trust_remote_code)
    widths = indicators.list_quantized_bits(quant.bits)
    model = Layerwise(checkpoint, quant, tokens, request.device, rows_at_once=calibration.rows_at_once)
    _check_bits(model, widths, quant)
    heads = _choose_head_bits(request.model_path, widths, quant)
    identity = {
        "model": fingerprint(request.model_path),
        "text": text_hash,
        "calibration": vars(calibration),
        "quant": vars(quant),
        "method": request.method,
        "seed": request.seed,
    }
    started = time.perf_counter()
    raw = _run_indicator(request, model, widths, Progress(request.folder, identity))
    indicator_seconds = time.perf_counter() - started
    uniform, low_heads = _measure_whole_model(request, model, widths, heads)
    table, notes = scale_to_loss(raw, uniform)
    ratio = loss_per_kl(uniform)
    details: dict[str, Any] = {
        "text": ", ".join(text.name for text in texts),
        "texts": len(texts),
        "rows": len(tokens),
        "tokens": tokens[:, 1:].numel(),
        "quant": {**make_groups(quant).to_json(), "optimize": quant.optimize},
        "raw": raw,
        "whole_model": dict(zip(map(str, widths), notes, strict=True)),
        "loss_per_kl": ratio,
        "text_spread": estimate_spread(uniform, ratio, kinds),
        "indicator_seconds": indicator_seconds,
        "calibration_seconds": time.perf_counter() - started - indicator_seconds,
        "peak_memory_bytes": peak_memory_bytes(request.device),
        "seed": request.seed,
        "hessian_estimate": calibration.hessian_estimate if request.method == "hessian" else None,
    }
    return Sensitivity(
        method=request.method,
        provenance="measured" if request.method == "measured" else "fitted",
        bits=tuple(widths),
        table=tuple(tuple(row) for row in table),
        model_fingerprint=identity["model"],
        calibration_hash=text_hash,
        head={width: ratio * found.kl for width, found in zip(heads, low_heads, strict=True)},
        details=details,
    )


def _run_indicator(
    request: SensitivityRequest, model: Layerwise, widths: list[int], progress: Progress
) -> indicators.Table:
    calibration, seed = request.calibration, request.seed

    def on_layer(done: int, total: int) -> None:
        request.on_layer(request.method, done, total)

    if request.method == "variance":
        return indicators.estimate_variance(model, widths, request.quant, progress, on_layer)
    if request.method == "hessian":
        rows, estimate = calibration.hessian_rows, calibration.hessian_estimate
        if estimate not in ("eigenvalue", "trace"):
            raise UserError(f"calibration.hessian_estimate={estimate!r} is unknown; use eigenvalue or trace.")
        return indicators.estimate_hessian(model, widths, progress, on_layer, rows, estimate, seed)
    if request.method == "random":
        return indicators.draw_table(model.layers, widths, seed)
    return indicators.measure_each_layer(model, widths, progress, on_layer, calibration.state_bytes)


def _measure_whole_model(
    request: SensitivityRequest, model: Layerwise, widths: list[int], heads: list[int]
) -> tuple[list[LossIncrease], list[LossIncrease]]:
    """All layers at one width, for each width; lm_head alone, for each of `heads`."""
    variants = [(width,) * model.layers for width in widths]
    found = measure(
        model,
        variants,
        lambda done, total: request.on_layer("calibrate", done, total),
        request.calibration.state_bytes,
        heads,
    )
    return [found[variant] for variant in variants], [found[width] for width in heads]


def _choose_head_bits(path: Path, widths: list[int], quant: QuantConfig) -> list[int]:
    """The widths at which to measure lm_head: `quant.lm_head_bits`, and all widths of the layers in which it can be
    packed, so that one table serves a sweep. `UserError`: it cannot have `quant.lm_head_bits`."""
    matrix = read_shape(path).lm_head
    size = matrix.out_features, matrix.in_features
    check_lm_head(*size, quant)
    able = [width for width in widths if find_lm_head_problem(*size, width, make_groups(quant)) is None]
    return sorted({*able, quant.lm_head_bits} - {UNQUANTIZED_BITS}, reverse=True)


def _check_bits(model: Layerwise, widths: list[int], quant: QuantConfig) -> None:
    if not widths:
        raise UserError("quant.bits holds no width below 16; there is nothing to be sensitive to.")
    for name, linear in model.linear_shapes().items():
        for width in widths:
            if reason := find_quantization_problem(*linear, width, make_groups(quant)):
                raise UserError(f"{name} cannot be kept at {width} bits: {reason}; leave the width out of quant.bits.")


def loss_per_kl(measured: Sequence[LossIncrease]) -> float:
    """Nats of loss per nat of KL, between 1/2 and 2, fitted to whole-model measurements by weighted least squares.

    On few tokens, KL is measured far more precisely than the small increase of the loss, and if the model fits the text
    the two have the same expectation. This factor corrects for a model that does not.
    """
    pairs = [(m.loss, m.kl, max(m.loss_error, 1e-9)) for m in measured if m.kl > 0]
    weight = sum(kl * kl / error**2 for _, kl, error in pairs)
    if not weight:
        return 1.0
    return min(max(sum(loss * kl / error**2 for loss, kl, error in pairs) / weight, 0.5), 2.0)


def estimate_spread(measured: Sequence[LossIncrease], ratio: float, kinds: Sequence[int]) -> float | None:
    """s, such that another text is expected (95 %) to lose Q +- s sqrt(Q) where Q is predicted; None for under three
    kinds of text.

    KL hardly depends on the text. But the loss differs from KL by a product of two small numbers: how far quantization
    moves the logits, about sqrt(KL), and how badly the model fits the text. So the kinds of text deviate roughly in
    proportion to sqrt(Q). Of the bit widths that lose little, the one at which they deviate most counts. Another text
    is one more draw, so its deviation follows Student's distribution.
    """
    from scipy.stats import t

    groups = [[row for row, kind in enumerate(kinds) if kind == wanted] for wanted in sorted(set(kinds))]
    known = [(found, ratio * found.kl) for found in measured if 0 < ratio * found.kl <= _LITTLE_LOSS]
    if len(groups) < 3 or not known:
        return None
    variance = max(
        sum((sum(found.by_row[row] for row in rows) / len(rows) - target) ** 2 for rows in groups) / target
        for found, target in known
    ) / (len(groups) - 1)
    return float(t.ppf(0.975, len(groups) - 1)) * (variance * (1 + 1 / len(groups))) ** 0.5


def scale_to_loss(
    raw: Sequence[Sequence[float]], uniform: Sequence[LossIncrease]
) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """(layers x widths in nats per token, what was measured by width). `uniform[j]`: all layers at width j.

    A column without information (all zero) is shared evenly.
    """
    ratio = loss_per_kl(uniform)
    columns, notes = [], []
    for column, whole in zip(zip(*raw, strict=True), uniform, strict=True):
        target, total = ratio * whole.kl, sum(column)
        columns.append([target * value / total if total > 0 else target / len(column) for value in column])
        notes.append(
            {"loss": whole.loss, "loss_error": whole.loss_error, "kl": whole.kl, "target": target, "raw_sum": total}
        )
    return [list(row) for row in zip(*columns, strict=True)], notes
