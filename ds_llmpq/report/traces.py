"""Reads Chrome traces and draws them as a Gantt chart of the stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.errors import make_printable
from ds_llmpq.files import read_json
from ds_llmpq.report import figures
from ds_llmpq.report.metrics_file import REMEDY, refuse_other_forms

_MOST_STAGES = 4096
_MOST_SPANS = 20_000  # beyond that, only the first are drawn


@dataclass(frozen=True)
class TracedSpan:
    """What a stage did for `seconds` from `start`, which counts from the first span of the trace."""

    stage: int
    name: str
    start: float
    seconds: float


def read_trace(file: Path) -> list[TracedSpan] | None:
    """Spans in order of their start; None if the file is missing. `UserError`: not a Chrome trace."""
    if not file.is_file():
        return None
    record = read_json(file, "trace", REMEDY)
    with refuse_other_forms(file):
        events = record["traceEvents"] if isinstance(record, dict) else record
        complete = [event for event in events if event.get("ph", "X") == "X" and "dur" in event]
        origin = min((event["ts"] for event in complete), default=0.0)
        spans = [_span(event, origin) for event in complete]
    return sorted(spans, key=lambda span: span.start)


def _span(event: dict[str, Any], origin: float) -> TracedSpan:
    """ValueError: no stage, or no time."""
    stage, start, seconds = int(event["pid"]), (event["ts"] - origin) / 1e6, event["dur"] / 1e6
    if not (0 <= stage < _MOST_STAGES and 0 <= start <= 1e12 and 0 <= seconds <= 1e12):
        raise ValueError(f"stage {stage}, start {start} or {seconds} s is out of range")
    return TracedSpan(stage, make_printable(event["name"], 100, keep=""), start, seconds)


def gantt(traces: dict[str, list[TracedSpan]], path: Path) -> Path:
    """A row of panels for each trace: all of it, and its beginning, in which single micro-batches are visible."""
    stages = 1 + max(span.stage for spans in traces.values() for span in spans)
    height = len(traces) * max(1.7, 0.35 * stages + 0.9)
    figure, axes = figures.make_figure(len(traces), 2, width=11, height=height, gridspec_kw={"width_ratios": [3, 2]})
    shown: dict[str, str] = {}
    for row, (title, spans) in zip(axes, traces.items(), strict=True):
        end = max(span.start + span.seconds for span in spans)
        for axis, until in zip(row, (end, _find_beginning(spans, end)), strict=True):
            _panel(axis, spans, until, stages, shown)
            axis.set_title(f"{title}, {'all' if until == end else 'its beginning'}", loc="left", fontsize=9)
    axes[-1][0].set_xlabel("seconds")
    axes[-1][1].set_xlabel("seconds")
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=figures.name_span(name)) for name, colour in shown.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower center", frameon=False, fontsize=8)
    return figures.save_figure(figure, path)


def _panel(axis: Any, spans: list[TracedSpan], until: float, stages: int, shown: dict[str, str]) -> None:
    within = [span for span in spans if span.start < until][:_MOST_SPANS]
    for stage in range(stages):
        mine = [span for span in within if span.stage == stage]
        names = [span.name for span in mine]
        for name in names:
            shown.setdefault(name, figures.SPANS.get(name, figures.OTHER))
        axis.broken_barh(
            [(span.start, span.seconds) for span in mine], (stage - 0.4, 0.8), facecolors=[shown[n] for n in names]
        )
    axis.set(xlim=(0, until), ylim=(stages - 0.4, -0.6), yticks=range(stages))
    axis.set_yticklabels([f"stage {stage}" for stage in range(stages)], fontsize=8)


def _find_beginning(spans: list[TracedSpan], end: float) -> float:
    """The end of the first rounds of decoding: prefill and up to 24 decode spans."""
    decodes = [span.start for span in spans if span.name == "decode"]
    if len(decodes) < 8:
        return end / 5
    return min(end, decodes[min(len(decodes) - 1, 24)])
