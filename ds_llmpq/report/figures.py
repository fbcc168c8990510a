"""What all pictures share: sizes, saving, and colours that colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_llmpq.wording import format_number

# Okabe and Ito; stages take them in turn
STAGES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
SPANS = {
    "prefill": "#0072B2",
    "decode": "#E69F00",
    "sample": "#009E73",
    # waiting is grey, from dark to light
    "wait_receive": "#555555",
    "wait_send": "#8A8A8A",
    "wait_tokens": "#B8B8B8",
    "wait_requests": "#E0E0E0",
}
PARTS = {"weights": "#0072B2", "kv": "#E69F00", "embed": "#009E73", "head": "#CC79A7", "workspace": "#56B4E9"}
OTHER = "#D55E00"


def make_figure(
    rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 3.6, **options: Any
) -> tuple[Any, Any]:
    """(figure, array of axes [rows, columns]); needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width, height)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def name_span(name: str) -> str:
    """wait_tokens -> "waits for tokens"."""
    return name.replace("wait_send", "waits to send").replace("wait_", "waits for ").replace("receive", "data")


def write_plainly(axis: Any) -> None:
    """Numbers at an axis as in the text: 2,500 and 0.002."""
    axis.set_major_formatter(lambda value, _: format_number(value, 4))


def save_figure(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
