"""From an indicator's own units to nats per token: a few whole-model measurements fix the size of each column.

For each width the whole model is quantized and measured once, and the column is scaled so that it sums to that. What
an indicator then decides is how a width's loss is shared among the layers; theta and `max_quality_loss` mean the same
under every indicator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_llmpq.sensitivity.layerwise import LossIncrease


def loss_per_kl(measured: Sequence[LossIncrease]) -> float:
    """Nats of loss per nat of KL, fitted by weighted least squares over whole-model measurements; between 1/2 and 2.

    KL is measured far more precisely than the small increase of the loss on few tokens, and equals it in expectation
    where the model fits the text; this is the correction where it does not.
    """
    pairs = [(m.loss, m.kl, max(m.loss_error, 1e-9)) for m in measured if m.kl > 0]
    weight = sum(kl * kl / error**2 for _, kl, error in pairs)
    if not weight:
        return 1.0
    return min(max(sum(loss * kl / error**2 for loss, kl, error in pairs) / weight, 0.5), 2.0)


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
