"""Work of a part in a micro-batch, as columns that a fit weighs: all non-negative, none falling in rows or length.

Any non-negative mixture of them is therefore a time that is never negative and never falls when there is more to do.
"""

from __future__ import annotations

from ds_llmpq.cost import arithmetic, products
from ds_llmpq.cost.latency import RooflineCosts

# rows from which on kernels change: matrix-vector, small and tall matrix products
_STEPS = (2, 4, 8, 16, 32)
# rows beyond which a further one takes longer, for torch's tensors no longer stay in the caches
_MANY_ROWS = 1024


def layer_features(roofline: RooflineCosts, bits: int, phase: str, batch: int, length: float) -> list[float]:
    """[seconds or counts] of one decoder layer: the roofline's parts, then rows and where kernels change.

    1 launches and dequantization (constant); matrix products at the roofline; their FLOPs; attention's FLOPs, bytes;
    elementwise bytes; sequences; one column for each step in rows; rows beyond many.
    """
    shape, size = roofline.shape, roofline.dtype_bytes
    new, past = (length, 0) if phase == "prefill" else (1, length)
    rows = batch * new
    weights = products.layer_read_bytes(shape, bits, roofline.kernel, roofline.groups, size)
    moved = shape.touched_share(rows) * weights + arithmetic.linear_activation_bytes(shape, rows, size)
    return [
        1.0,
        roofline.roof(arithmetic.linear_flops(shape, rows), moved),
        roofline.roof(arithmetic.linear_flops(shape, rows), 0),
        roofline.roof(arithmetic.attention_flops(shape, batch, new, past), 0),
        roofline.roof(0, arithmetic.attention_bytes(shape, batch, new, past, size)),
        roofline.roof(0, arithmetic.elementwise_bytes(shape, rows, size)),
        float(batch),
        *(float((batch if phase == "decode" else rows) >= step) for step in _STEPS),
        max(0.0, rows - _MANY_ROWS),
    ]


def part_features(roofline: RooflineCosts, part: str, batch: int, tokens: int) -> list[float]:
    """Embedding, head, and what a pass costs beside its layers: a constant, sequences, rows, the roofline's time."""
    rows = batch * tokens
    if part == "embed":
        work = roofline.embed_work(batch, tokens)
    elif part == "head":
        work = roofline.head_work(batch)
    else:
        work = 0.0
    return [1.0, float(batch), float(rows), work]
