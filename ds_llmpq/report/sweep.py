"""Summarizes a Hydra multirun: summary.csv, summary.json and a picture of throughput against quality loss."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ds_llmpq.errors import RunFailed, UserError
from ds_llmpq.files import csv_cell, read_yaml, write_json
from ds_llmpq.plan import BASELINES, ESTIMATES, read_plan
from ds_llmpq.report import figures
from ds_llmpq.report.metrics_file import REMEDY, look_up, read_metrics
from ds_llmpq.report.plan_table import format_table, predict_cost
from ds_llmpq.validation import Label, Note, validate
from ds_llmpq.wording import format_number, quote_argument

_FAILURE = "failure.json"
PAGE_NAME = "sweep.html"
_WIDEST_CELL = 90  # characters; summary.csv has the whole text
_SHOWN = ("throughput_tokens_per_second", "latency_seconds", "quality_loss", "stages", "widths", "gap", "failure")
_MEASURED = ("measured_throughput_tokens_per_second", "measured_quality_loss")
_COSTS = ("cost_per_million_generated_tokens", "measured_cost_per_million_generated_tokens")
BASELINE_KEY = "planner.baseline"  # swept: each baseline is a point of its own, and ours is null

_exit_codes: ContextVar[list[int]] = ContextVar("exit codes of the points of a sweep that failed")


@contextlib.contextmanager
def collect_exit_codes() -> Iterator[list[int]]:
    """Collects the exit codes of failed points from sweeps that end within the block. A Hydra callback returns nothing,
    and points run in other processes, so failures are read from the files they leave."""
    token = _exit_codes.set([])
    try:
        yield _exit_codes.get()
    finally:
        _exit_codes.reset(token)


def note_exit_codes(codes: Iterable[int]) -> None:
    _exit_codes.get([]).extend(codes)


@dataclass(frozen=True)
class PointFailure:
    """The keys of failure.json that are shown."""

    message: Note
    exit_code: Annotated[int, Ge(1), Le(255)]


def read_failure(folder: Path) -> PointFailure:
    """Why a point failed. `UserError`: failure.json has another form."""
    return validate(PointFailure, read_metrics(folder / _FAILURE), str(folder / _FAILURE), REMEDY, ignore_unknown=True)


def note_failure(out: Path, error: UserError) -> None:
    """Writes failure.json into `out`: a sentence, an exit code and, if a pipeline failed, the rank, kind and place
    (docs/faults.md). A full disk is ignored."""
    failure = {"failure": dict(error.failure)} if isinstance(error, RunFailed) else {}
    with contextlib.suppress(UserError):
        if out.is_dir():
            write_json(out / _FAILURE, {"message": str(error), "exit_code": error.exit_code} | failure)


def forget_failure(out: Path) -> None:
    """Removes failure.json before a point is tried again, and after a command has succeeded."""
    with contextlib.suppress(OSError):
        (out / _FAILURE).unlink(missing_ok=True)


def holds_work(out: Path) -> bool:
    """Whether a folder holds the output of an earlier command that did not fail. If a command refuses to overwrite it,
    that failure is not noted there."""
    made = (path.name for path in out.iterdir() if path.suffix != ".log" and not path.name.startswith("."))
    return not (out / _FAILURE).exists() and any(made)


class SweepSummary(Callback):
    """Hydra callback that runs once, in the parent process, after all points of a sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        points = [read_point(place) for place in list_points(folder)]
        note_exit_codes(point["exit_code"] for point in points if point["failure"])
        write_summary(folder, points)
        print(format_summary(points))
        page = f"ds-llmpq report {quote_argument('sweep', folder)}"
        print(f"sweep: {folder / 'summary.csv'} (a page with pictures: `{page}`)")


def list_points(folder: Path) -> list[Path]:
    """Folders of a multirun's points, numbers in their names in numerical order. A report on the sweep is no point."""
    found = {place.parent for name in (".hydra", "plan.json") for place in folder.glob(f"*/{name}")}
    found = {place for place in found if not (place / PAGE_NAME).exists()}
    return sorted(found, key=lambda place: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", place.name)])


def write_summary(folder: Path, points: list[dict[str, Any]]) -> None:
    """Writes the points as CSV and JSON, and a plot of throughput against quality loss."""
    write_json(folder / "summary.json", points)
    keys = list(dict.fromkeys(key for point in points for key in point["overrides"]))
    with open(folder / "summary.csv", "w", newline="") as stream:
        fields = ["point", *map(csv_cell, keys), *_SHOWN, *_MEASURED, *_COSTS, *BASELINES, "exit_code"]
        writer = csv.DictWriter(stream, fields, extrasaction="ignore")
        writer.writeheader()
        rows = ({**point["overrides"], **point} for point in points)
        writer.writerows({csv_cell(key): csv_cell(value) for key, value in row.items()} for row in rows)
    solved = [point for point in points if not point["failure"]]
    if solved:
        plot(folder / "pareto.png", solved)


def select_pareto_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other beats in both throughput and quality loss, in order of rising loss."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["quality_loss"], -p["throughput_tokens_per_second"])):
        if not front or point["throughput_tokens_per_second"] > front[-1]["throughput_tokens_per_second"]:
            front.append(point)
    return front


def format_points(points: list[dict[str, Any]]) -> str:
    """The points as a plain-text table."""
    return format_table(*build_table(points))


def format_summary(points: list[dict[str, Any]]) -> str:
    """Table and mean speed-ups, ready to print."""
    return "\n".join([format_points(points), *describe_speedups(points)])


def build_table(points: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) without empty columns; a baseline's cell also has our speed-up over it."""
    columns = ["point", *_SHOWN[:3], *_MEASURED, *_COSTS, *BASELINES, *_SHOWN[3:]]
    columns = [name for name in columns if name in ("point", *_SHOWN[:-1]) or any(point.get(name) for point in points)]
    names = {"throughput_tokens_per_second": "tokens/s", "measured_throughput_tokens_per_second": "measured"}
    names |= {"latency_seconds": "latency s", "quality_loss": "loss", "measured_quality_loss": "measured loss"}
    names |= dict(zip(_COSTS, ("cost per million generated", "measured cost"), strict=True))
    names |= {"memory_proportional": "by memory", "single_device": "one device"}
    names |= {name: f"{name} (estimate)" for name in ESTIMATES}
    keys = find_varied(points)
    if BASELINE_KEY in keys:
        columns = [name for name in columns if name not in BASELINES]
    names["point"] = f"point ({', '.join(keys)})" if keys else "point"
    rows = [[label_point(point, keys), *(_describe(point, name) for name in columns[1:])] for point in points]
    return [names.get(name, name) for name in columns], rows


def describe_speedups(points: list[dict[str, Any]]) -> list[str]:
    """One line per baseline: the mean speed-up over the points at which it has a plan; measured if baselines ran."""
    if BASELINE_KEY in find_varied(points):
        return _compare_points(points)
    lines = []
    for name in BASELINES:
        ratios = [p["throughput_tokens_per_second"] / p[name] for p in points if not p["failure"] and p[name]]
        if ratios:
            geometric = math.exp(sum(map(math.log, ratios)) / len(ratios))
            kind = " (an estimate, no plan)" if name in ESTIMATES else ""
            lines.append(
                f"predicted speed-up over {name}{kind}: mean {sum(ratios) / len(ratios):.2f}x, geometric mean "
                f"{geometric:.2f}x, {min(ratios):.2f}x to {max(ratios):.2f}x on {len(ratios)} of {len(points)} points"
            )
    return lines


def _compare_points(points: list[dict[str, Any]]) -> list[str]:
    """One line per swept baseline: how much faster our own plan is at the points that are otherwise the same."""
    by_rest: dict[str, dict[str, dict[str, Any]]] = {}
    for point in points:
        rest = {key: value for key, value in point["overrides"].items() if key != BASELINE_KEY}
        name = point["overrides"].get(BASELINE_KEY, "null")
        by_rest.setdefault(json.dumps(rest, sort_keys=True), {})[name] = point
    lines = []
    for name in dict.fromkeys(name for group in by_rest.values() for name in group if name != "null"):
        pairs = [(group["null"], group[name]) for group in by_rest.values() if {"null", name} <= group.keys()]
        found = []
        for kind, key in (("measured", _MEASURED[0]), ("predicted", _SHOWN[0])):
            ratios = [ours[key] / theirs[key] for ours, theirs in pairs if ours[key] and theirs[key]]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                span = f"{min(ratios):.2f}x to {max(ratios):.2f}x on {len(ratios)} points"
                found.append(f"{kind} {mean:.2f}x" + (f" ({span})" if max(ratios) > min(ratios) else ""))
        lines.append(f"speed-up over {name}: {', '.join(found) or 'it has no plan'}")
    return lines


def _describe(point: dict[str, Any], name: str) -> str:
    if name == "gap" and point[name] is not None:
        return f"{format_number(100 * point[name], 2)} %"
    return _baseline(point, name) if name in BASELINES else _cell(point[name])


def _baseline(point: dict[str, Any], name: str) -> str:
    theirs = point[name]
    if not theirs:
        return "-"
    ratio = point["throughput_tokens_per_second"] / theirs
    loss = f", loss {format_number(point['baseline_losses'][name])}" if ratio < 1 else ""  # what that speed costs
    return f"{format_number(theirs, 4)} ({ratio:.2f}x{loss})"


def read_point(folder: Path) -> dict[str, Any]:
    """A point as a flat record: predictions, measurements (if it was run or scored) and baselines, or its failure."""
    empty = dict.fromkeys((*_SHOWN, *_MEASURED, *_COSTS, *BASELINES), None)
    empty |= {"point": folder.name, "overrides": _overrides(folder), "baseline_losses": {}}
    if (folder / _FAILURE).is_file():
        failure = read_failure(folder)
        return empty | {"failure": failure.message, "exit_code": failure.exit_code}
    if not (folder / "plan.json").is_file():
        return empty | {"failure": "no plan.json was written", "exit_code": 1}
    try:
        plan = read_plan(folder / "plan.json")
    except UserError as error:
        return empty | {"failure": str(error), "exit_code": error.exit_code}
    metrics, scores = (read_metrics(folder / name) for name in ("metrics.json", "scores.json"))
    widths = sorted({width for stage in plan.stages for width in stage.bits})
    baselines = {name: e for name, e in plan.baselines.items() if name in BASELINES and not isinstance(e, str)}
    return empty | {
        "exit_code": 0,
        **{name: getattr(plan.predicted, name) for name in _SHOWN[:3]},
        "stages": len(plan.stages),
        "widths": " ".join(map(str, widths)),
        "gap": plan.solver.gap,
        **{name: entry.throughput_tokens_per_second for name, entry in baselines.items()},
        "baseline_losses": {name: entry.quality_loss for name, entry in baselines.items()},
        _COSTS[0]: (predict_cost(plan) or {}).get("per_million_generated_tokens"),
        _COSTS[1]: look_up(metrics, "cost", "per_million_generated_tokens"),
        "measured_throughput_tokens_per_second": look_up(metrics, "measured", _SHOWN[0]),
        "measured_quality_loss": look_up(scores, "loss_increase", "measured"),
    }


def _overrides(folder: Path) -> dict[str, str]:
    """The overrides of a point, as Hydra stores them."""
    file = folder / ".hydra" / "overrides.yaml"
    if not file.is_file():
        return {}
    entries = validate(list[Label], read_yaml(file, "overrides", REMEDY), f"overrides {file}", REMEDY)
    pairs = (entry.partition("=") for entry in entries)
    return {key.lstrip("+"): value for key, _, value in pairs if key not in ("out", "input")}


def find_varied(points: list[dict[str, Any]]) -> list[str]:
    """Swept keys that take more than one value."""
    keys = dict.fromkeys(key for point in points for key in point["overrides"])
    return [key for key in keys if len({point["overrides"].get(key) for point in points}) > 1]


def label_point(point: dict[str, Any], keys: list[str]) -> str:
    """The point's values of the varied keys."""
    values = {key: point["overrides"][key] for key in keys if key in point["overrides"]}
    if values.get(BASELINE_KEY) == "null":
        values[BASELINE_KEY] = "ours"
    return ", ".join(values.values()) or point["point"]


def plot(path: Path, points: list[dict[str, Any]]) -> bool:
    """Plots throughput against quality loss; points that coincide share a label. Whether some of it was measured."""
    figure, ((axes,),) = figures.make_figure(width=8, height=4.5)
    front = select_pareto_front(points)
    axes.plot([p["quality_loss"] for p in front], [p["throughput_tokens_per_second"] for p in front], "-", color="0.7")
    groups: dict[tuple[float, float], list[str]] = {}
    keys = find_varied(points)
    for point in points:
        place = (point["quality_loss"], point["throughput_tokens_per_second"])
        groups.setdefault(place, []).append(label_point(point, keys))
    predicted = axes.scatter(*zip(*groups, strict=True), color=figures.STAGES[0], label="predicted")
    for place, names in groups.items():
        text = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        axes.annotate(text, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    measured = [p for p in points if p[_MEASURED[0]] and p[_MEASURED[1]] is not None]
    if measured:
        places = [[p[name] for p in measured] for name in reversed(_MEASURED)]
        axes.scatter(*places, marker="x", color=figures.STAGES[5], label="measured")
        axes.legend(frameon=False)
    axes.locator_params(axis="x", nbins=6)
    figures.write_plainly(axes.xaxis)
    figures.write_plainly(axes.yaxis)
    axes.margins(x=0.15, y=0.1)
    if min(loss for loss, _ in groups) >= 0 and not any(p[_MEASURED[1]] < 0 for p in measured):
        axes.set_xlim(left=max(axes.get_xlim()[0], 0.0))  # no loss below 0 where there is none
        predicted.set_clip_on(False)
    axes.set(xlabel="quality loss (nats per token)", ylabel="throughput (tokens/s)")
    figures.save_figure(figure, path)
    return bool(measured)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = format_number(value, 4) if isinstance(value, float) else str(value)
    return text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 3] + "..."
