"""A quality table without any data: what published perplexities say that a whole model loses at a width.

The perplexities are of BLOOM-3b and OPT-1.3b on three corpora (Wikitext2, PTB, C4) at 8, 4 and 3 bits, with weight-only
quantization of all decoder linears. The mean over models and corpora of their log-ratios to the 8-bit value is the loss
in nats per token. 8, 2 and 1 bits were not compared with full precision: they follow from the nearest measured width,
because output variance grows with the squared step, (1 / (2^bits - 1))^2. Larger models lose less, and layers differ:
the prior is only a placeholder that lets planning start, and is tagged `assumed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ds_llmpq.errors import UserError
from ds_llmpq.quant.packing import PACKED_BITS
from ds_llmpq.sensitivity.table import Sensitivity

# model -> bits -> perplexity on (Wikitext2, PTB, C4)
PUBLISHED_PERPLEXITY = {
    "BLOOM-3b": {8: (13.50, 23.14, 16.16), 4: (14.13, 24.27, 16.68), 3: (17.33, 30.57, 19.43)},
    "OPT-1.3b": {8: (14.61, 16.98, 14.73), 4: (15.67, 18.30, 15.55), 3: (21.30, 25.87, 19.74)},
}
_NEAREST_MEASURED = {8: 4, 2: 3, 1: 3}


def average_published_loss(bits: int) -> float:
    """Mean over models and corpora of ln(perplexity at `bits` / perplexity at 8 bits), for 4 or 3 bits."""
    ratios = [
        math.log(at / reference)
        for perplexity in PUBLISHED_PERPLEXITY.values()
        for at, reference in zip(perplexity[bits], perplexity[8], strict=True)
    ]
    return sum(ratios) / len(ratios)


def model_loss(bits: int) -> float:
    """Nats per token that a whole model is assumed to lose at `bits`; nothing at 16."""
    if bits == 16:
        return 0.0
    if bits in (4, 3):
        return average_published_loss(bits)
    if bits not in _NEAREST_MEASURED:
        raise UserError(f"there is no prior for {bits} bits; it knows 1, 2, 3, 4, 8 and 16")
    measured = _NEAREST_MEASURED[bits]
    return average_published_loss(measured) * ((2**measured - 1) / (2**bits - 1)) ** 2


def make_prior(layers: int, bits: Sequence[int], model_fingerprint: str | None = None) -> Sensitivity:
    """The loss of the whole model, spread evenly over its layers; lm_head loses as much as one of them."""
    row = tuple(model_loss(width) / layers for width in bits)
    return Sensitivity(
        method="prior",
        provenance="assumed",
        bits=tuple(bits),
        table=(row,) * layers,
        model_fingerprint=model_fingerprint,
        head={width: model_loss(width) / layers for width in PACKED_BITS},
        details={"source": "published perplexities of BLOOM-3b and OPT-1.3b", "spread": "even over layers"},
    )
