"""What a Hydra multirun made, gathered: summary.csv, summary.json and a picture of throughput against quality loss."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ds_llmpq.errors import UserError
from ds_llmpq.report.plan_table import table

_FAILURE = "failure.json"
_WIDEST_CELL = 90  # characters; summary.csv has all of a long sentence
_SHOWN = ("throughput_tokens_per_second", "latency_seconds", "quality_loss", "stages", "widths", "gap", "failure")

# exit codes of the points of a finished sweep that failed
failure_codes: list[int] = []


def note_failure(out: Path, error: UserError) -> None:
    """Leaves a point's mistake in its folder, where the sweep's summary finds it."""
    if out.is_dir():
        (out / _FAILURE).write_text(json.dumps({"message": str(error), "exit_code": error.exit_code}) + "\n")


class SweepSummary(Callback):
    """Hydra callback: runs once, in the parent, after all points of a sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        points = [point_of(place.parent) for place in sorted(folder.glob("*/.hydra"))]
        failure_codes.extend(point["exit_code"] for point in points if point["failure"])
        write_summary(folder, points)
        print(
            table(["point", *_SHOWN], [[point["point"], *(_cell(point[name]) for name in _SHOWN)] for point in points])
        )
        print(f"sweep: {folder / 'summary.csv'}")


def write_summary(folder: Path, points: list[dict[str, Any]]) -> None:
    """The points as CSV and JSON, and throughput against quality loss as a PNG."""
    (folder / "summary.json").write_text(json.dumps(points, indent=1) + "\n")
    with open(folder / "summary.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["point", *_SHOWN, "exit_code"])
        writer.writeheader()
        writer.writerows(points)
    solved = [point for point in points if not point["failure"]]
    if solved:
        _plot(folder / "pareto.png", solved)


def pareto_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that no other one beats in both throughput and quality loss, by rising loss."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["quality_loss"], -p["throughput_tokens_per_second"])):
        if not front or point["throughput_tokens_per_second"] > front[-1]["throughput_tokens_per_second"]:
            front.append(point)
    return front


def summary_table(points: list[dict[str, Any]]) -> str:
    """The points as a plain-text table."""
    return table(["point", *_SHOWN], [[point["point"], *(_cell(point[name]) for name in _SHOWN)] for point in points])


def point_of(folder: Path) -> dict[str, Any]:
    empty = dict.fromkeys(_SHOWN, None)
    if (folder / _FAILURE).is_file():
        failure = json.loads((folder / _FAILURE).read_text())
        return empty | {"point": folder.name, "failure": failure["message"], "exit_code": failure["exit_code"]}
    if not (folder / "plan.json").is_file():
        return empty | {"point": folder.name, "failure": "no plan.json was written", "exit_code": 1}
    plan = json.loads((folder / "plan.json").read_text())
    widths = sorted({width for stage in plan["stages"] for width in stage["bits"]})
    return empty | {
        "point": folder.name,
        "exit_code": 0,
        **{name: plan["predicted"][name] for name in _SHOWN[:3]},
        "stages": len(plan["stages"]),
        "widths": " ".join(map(str, widths)),
        "gap": plan["solver"]["gap"],
    }


def _plot(path: Path, points: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    front = pareto_front(points)
    axes.plot([p["quality_loss"] for p in front], [p["throughput_tokens_per_second"] for p in front], "-", color="0.6")
    axes.scatter([p["quality_loss"] for p in points], [p["throughput_tokens_per_second"] for p in points])
    for point in points:
        place = (point["quality_loss"], point["throughput_tokens_per_second"])
        axes.annotate(point["point"], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel("predicted quality loss (nats per token)")
    axes.set_ylabel("predicted throughput (tokens/s)")
    axes.set_title("Sweep: throughput against quality loss")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 3] + "..."
