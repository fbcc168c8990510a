"""Plots of simulated schedules and of length distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ds_llmpq.report import figures
from ds_llmpq.research.queue_simulator import BATCHINGS

_LABELS = {
    "load": "load (share of what the slots could do)",
    "rate": "arrivals (jobs/s)",
    "max_batch": "slots",
    "cv": "burstiness (coefficient of variation of gaps)",
    "jct_mean_seconds": "mean job completion time (s)",
    "throughput_jobs_per_second": "throughput (jobs/s)",
}


def plot_against(path: Path, rows: list[dict[str, Any]], x: str, y: str) -> bool:
    """One panel for each batching, one line for each policy; `y` is averaged over whatever else varies. False if `x`
    does not vary."""
    values = sorted({row[x] for row in rows if row[x] is not None})
    if len(values) < 2:
        return False
    panels = [name for name in BATCHINGS if any(row["batching"] == name for row in rows)]
    figure, (axes,) = figures.make_figure(1, len(panels), width=3.6 * len(panels))
    for axis, batching in zip(axes, panels, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            chosen = [row for row in rows if row["batching"] == batching and row["policy"] == policy]
            points = [(value, [row[y] for row in chosen if row[x] == value]) for value in values]
            points = [(value, float(np.mean(found))) for value, found in points if found]
            axis.plot(*zip(*points, strict=True), "o-", label=policy, markersize=3)
        axis.set_title(f"batching: {batching}")
        axis.set_xlabel(_LABELS[x])
    axes[0].set_ylabel(_LABELS[y])
    axes[0].legend()
    figures.save_figure(figure, path)
    return True


def plot_lengths(folder: Path, lengths: dict[str, np.ndarray]) -> list[str]:
    """Box plot (whiskers p5 and p95) and histogram of output tokens by model. Returns the names of the files."""
    names = list(lengths)
    figure, ((axis,),) = figures.make_figure(width=max(5.0, 0.5 * len(names) + 3))
    axis.boxplot(list(lengths.values()), whis=(5, 95), showfliers=False, tick_labels=names)
    axis.tick_params(axis="x", rotation=60 if len(names) > 3 else 0)
    axis.set_ylabel("output tokens")
    figures.save_figure(figure, folder / "lengths_box.png")
    figure, ((axis,),) = figures.make_figure(width=6.5)
    bins = np.linspace(0, max(float(np.percentile(np.concatenate(list(lengths.values())), 99.5)), 1.0), 60)
    for name, values in lengths.items():
        axis.hist(values, bins=bins, density=True, histtype="step", label=name)
    axis.set_xlabel("output tokens")
    axis.set_ylabel("share per token")
    if len(names) <= 12:
        axis.legend(fontsize=7)
    figures.save_figure(figure, folder / "lengths_histogram.png")
    return ["lengths_box.png", "lengths_histogram.png"]
