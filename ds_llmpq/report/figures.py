"""What the pictures of a report share: colours that colour-blind readers can tell apart, sizes, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito; stages take them in turn
STAGES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
SPANS = {
    "prefill": "#0072B2",
    "decode": "#E69F00",
    "sample": "#009E73",
    "wait_receive": "#D9D9D9",
    "wait_send": "#BFBFBF",
    "wait_tokens": "#EDEDED",
}
PARTS = {"weights": "#0072B2", "kv": "#E69F00", "embed": "#009E73", "head": "#CC79A7", "workspace": "#56B4E9"}
OTHER = "#D55E00"


def span_colour(name: str) -> str:
    """Work in colours, waiting in greys."""
    return SPANS.get(name, "#DDDDDD" if name.startswith("wait_") else OTHER)


def stage_colour(index: int) -> str:
    return STAGES[index % len(STAGES)]


def make_figure(
    rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 3.6, **options: Any
) -> tuple[Any, Any]:
    """(figure, array of axes [rows, columns]); drawn without any display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width, height)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
