"""A multirun as sweep.html, pictures and a table: throughput against quality, heat maps, baselines."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.report import figures, sweep
from ds_llmpq.report.page import Section, render_page
from ds_llmpq.wording import format_number, pluralize

Point = dict[str, Any]
_MOST_VALUES = 24  # on an axis of a heat map
_WIDEST = 10.0  # inches of a picture: a page shows wider ones with smaller letters


def write_sweep_report(folder: Path, out: Path) -> str:
    """Writes sweep.html, sweep.txt and the pictures into `out`; returns the text. `UserError`: no point has a plan."""
    points = [point for point in read_points(folder) if (folder / point["point"]).resolve() != out.resolve()]
    solved = [point for point in points if not point["failure"]]
    if not solved:
        raise UserError(f"{folder} holds no point with a plan; give the folder of `ds-llmpq plan -m` or `run -m`.")
    out.mkdir(parents=True, exist_ok=True)
    text = sweep.format_summary(points)
    sections = [_points(points), _pareto(solved, out), _heat(solved, out), _baselines(solved, out)]
    (out / sweep.PAGE_NAME).write_text(
        render_page("A sweep", f"{folder.resolve().name}: {pluralize(len(points), 'point')}.", sections), "utf-8"
    )
    (out / "sweep.txt").write_text(text + "\n", encoding="utf-8")
    return text


def read_points(folder: Path) -> list[Point]:
    """The points in the folder of a multirun, even of one that did not finish."""
    try:
        return [sweep.read_point(place) for place in sweep.list_points(folder)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds a plan.json that cannot be read ({error!r}); plan that point again.") from None


def _points(points: list[Point]) -> Section:
    section = Section("points", "Points", "Every point of the sweep, with measurements if the plan was run or scored.")
    head, rows = sweep.build_table(points)
    section.table(head[:-1], [row[:-1] for row in rows])  # failures are sentences
    return section.sentences([f"{point['point']}: {point['failure']}" for point in points if point["failure"]])


def _pareto(points: list[Point], out: Path) -> Section:
    shown = "Predicted and measured" if sweep.plot(out / "pareto.png", points) else "Predicted"
    return Section(
        "pareto",
        "Throughput against quality",
        f"{shown}. The line joins the points that no other beats in both.",
    ).picture(out / "pareto.png", "throughput against quality loss")


def _heat(points: list[Point], out: Path) -> Section:
    section = Section("heat", "Heat maps", "Predicted tokens/s and quality loss over pairs of swept keys.")
    keys = sweep.find_varied(points)
    for first, second in combinations([key for key in keys if key != sweep.BASELINE_KEY], 2):
        name = f"heat_{_safe(first)}_{_safe(second)}.png"
        if plot_heat_map(points, first, second, out / name):
            section.picture(out / name, f"{first} against {second}")
    if not section.parts:
        section.sentences([f"No two keys were varied together (varied: {', '.join(keys) or 'none'})."])
    return section


def plot_heat_map(points: list[Point], first: str, second: str, path: Path) -> bool:
    """Averages over whatever else varies. False if a key takes too many values, or only one."""
    columns, rows = (_values(points, key) for key in (first, second))
    if min(len(columns), len(rows)) < 2 or max(len(columns), len(rows)) > _MOST_VALUES:
        return False
    figure, axes = figures.make_figure(1, 2, width=max(8.0, 3 + 1.5 * len(columns)), height=1.6 + 0.5 * len(rows))
    titles = {"throughput_tokens_per_second": "tokens/s", "quality_loss": "quality loss, nats per token"}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        table = [[_mean(points, {first: x, second: y}, name) for x in columns] for y in rows]
        image = axis.imshow(table, aspect="auto", cmap="viridis")
        middle = (image.norm.vmin + image.norm.vmax) / 2 if image.norm.vmax is not None else 0
        for j, line in enumerate(table):
            for i, value in enumerate(line):
                if not math.isnan(value):
                    colour = "black" if value > middle else "white"
                    axis.text(i, j, format_number(value), ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set(xlabel=first, ylabel=second)
        axis.set_title(title, fontsize=10)
    figures.save_figure(figure, path)
    return True


def _baselines(points: list[Point], out: Path) -> Section:
    section = Section("baselines", "Baselines", "Predicted tokens/s of each plan and of its baselines.")
    bars = {"ours": "throughput_tokens_per_second"}
    if sweep.BASELINE_KEY in sweep.find_varied(points):  # each point is one method's plan
        bars = {"predicted": "throughput_tokens_per_second", "measured": "measured_throughput_tokens_per_second"}
        section.lead = "Tokens/s of each method's plan, predicted, and measured where it was run."
    else:
        bars |= {name: name for name in sweep.BASELINES if any(point[name] for point in points)}
    if len(bars) == 1:
        return section.sentences(["No baseline has a plan."])
    figure, ((axis,),) = figures.make_figure(width=min(max(7.0, 0.9 * len(points) + 3), _WIDEST), height=4.2)
    width, keys = 0.85 / len(bars), sweep.find_varied(points)
    for index, (label, name) in enumerate(bars.items()):
        values = [point[name] or 0.0 for point in points]
        axis.bar(
            [i + index * width for i in range(len(points))], values, width, label=label, color=figures.STAGES[index]
        )
    axis.set_xticks(
        [i + 0.4 for i in range(len(points))],
        [sweep.label_point(p, keys) for p in points],
        rotation=40,
        ha="right",
        fontsize=8,
    )
    axis.set_ylabel("tokens/s" if "measured" in bars else "predicted tokens/s")
    figures.write_plainly(axis.yaxis)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    section.picture(figures.save_figure(figure, out / "baselines.png"), "tokens/s of baselines")
    return section.sentences(sweep.describe_speedups(points))


def _values(points: list[Point], key: str) -> list[str]:
    found = {point["overrides"][key] for point in points if key in point["overrides"]}

    def order(value: str) -> tuple[int, float, str]:
        try:
            return 0, float(value), value
        except ValueError:
            return 1, 0.0, value

    return sorted(found, key=order)


def _mean(points: list[Point], where: dict[str, str], name: str) -> float:
    found = [p[name] for p in points if all(p["overrides"].get(key) == value for key, value in where.items())]
    return sum(found) / len(found) if found else math.nan


def _safe(key: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in key.strip("+"))
