"""What a sweep of `simulate` showed, gathered: summary.csv, plots against load, rate and burstiness, comparison.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ds_llmpq.files import csv_cell
from ds_llmpq.report import sweep
from ds_llmpq.report.metrics_file import read_metrics
from ds_llmpq.research.queue_simulator import BATCHINGS
from ds_llmpq.research.schedule_plots import plot_against
from ds_llmpq.research.schedule_text import comparison_text

Row = dict[str, Any]


class SimulationSummary(Callback):
    """Hydra callback: runs once, in the parent, after all points of a sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        points = sorted(place.parent for place in folder.glob("*/.hydra"))
        for point in points:
            if (point / "failure.json").is_file():
                failure = sweep.read_failure(point)
                sweep.note_exit_codes([failure.exit_code])
                print(f"{point.name}: {failure.message}")
        found = [metrics for point in points if (metrics := read_metrics(point / "metrics.json")) is not None]
        if found:
            write_comparison(folder, found)
            print(f"comparison: {folder / 'comparison.md'}")


def write_comparison(folder: Path, found: list[dict[str, Any]]) -> None:
    """The metrics of all points as summary.csv, plots and comparison.md."""
    found = sorted(found, key=lambda point: BATCHINGS.index(point["settings"]["batching"]))
    rows = [row for point in found for row in point_rows(point)]
    with open(folder / "summary.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    plots = []
    for x in ("load", "rate", "cv", "max_batch"):
        for y in ("jct_mean_seconds", "throughput_jobs_per_second"):
            if plot_against(folder / f"{y.split('_')[0]}_against_{x}.png", rows, x, y):
                plots.append(f"{y.split('_')[0]}_against_{x}.png")
    (folder / "comparison.md").write_text(comparison_text(rows, plots), encoding="utf-8")


def point_rows(point: dict[str, Any]) -> list[Row]:
    """One row a policy: where the point lies, its metrics, and the published ratios."""
    settings = point["settings"]
    arrivals = settings["arrivals"]
    place = {
        "batching": settings["batching"],
        "max_batch": settings["max_batch"],
        "arrivals": arrivals["kind"],
        "load": arrivals["load"],
        "rate": None if arrivals["load"] is not None else arrivals["rate"],
        "cv": arrivals["cv"] if arrivals["kind"] == "gamma" else None,
        "prediction": settings["prediction"]["kind"],
        "sigma": settings["prediction"]["sigma"] if settings["prediction"]["kind"] in ("noisy", "classes") else None,
    }
    ratios = {f"published_{name}_ratio": value for name, value in (point["published"] or {}).items()}
    empty = dict.fromkeys(
        ("published_jct_mean_ratio", "published_throughput_at_quarter_ratio", "published_throughput_whole_run_ratio")
    )
    return [
        place | {"policy": policy} | metrics | empty | (ratios if policy == "ssjf" else {})
        for policy, metrics in point["policies"].items()
    ]
