"""Shows how far off predictions are: tables, a scatter plot, and one sentence on whether to trust a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ds_llmpq.cost.fit import LatencyModel
from ds_llmpq.errors import UserError
from ds_llmpq.report import figures
from ds_llmpq.report.metrics_file import REMEDY, read_metrics, refuse_other_forms
from ds_llmpq.report.plan_table import format_milliseconds, format_table
from ds_llmpq.report.run_summary import judge_metrics
from ds_llmpq.wording import format_percent, pluralize

TIMED = ("latency", "prefill", "decode")
TRUSTED, USABLE = 0.06, 0.15  # mean absolute error up to which times are trusted, or good for a ranking


@dataclass(frozen=True)
class TimePair:
    """One prediction and its measurement. They are grouped by device, phase and bits."""

    device: str
    phase: str
    bits: str
    predicted_seconds: float
    measured_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_seconds / self.measured_seconds - 1.0


def pair_profile(model: LatencyModel) -> list[TimePair]:
    """Every profiled point, predicted by a fit without that point."""
    return [
        TimePair(fit.device_type, _name_phase(fit.part, fit.phase), str(fit.bits or "-"), r.left_out_seconds, r.seconds)
        for fit in model.fits.values()
        if fit.part in ("layer", "embed", "head")
        for r in fit.residuals
    ]


def _name_phase(part: str, phase: str) -> str:
    return phase if part == "layer" else f"{part} {phase}" if part == "embed" else part


def format_profile(model: LatencyModel) -> str:
    pairs = pair_profile(model)
    if not pairs:
        return "the profile has too few points for a fit; profile with a longer profiling.seconds"
    layers = [pair for pair in pairs if pair.phase in ("prefill", "decode")]
    spread = [r.spread for fit in model.fits.values() if fit.part == "layer" for r in fit.residuals]
    lines = [format_errors(pairs), verdict(layers or pairs, "left-out points")]
    if spread and median(spread) > 0.1:
        lines.append(
            f"note: the measurements themselves scatter by {format_percent(median(spread))} (median over points); "
            "other programs were running, so profile again on a quiet machine before trusting small differences"
        )
    return "\n".join(lines)


def format_kernels(note: dict[str, Any]) -> str:
    """Milliseconds of one decoder layer's linears by kernel, width and rows."""
    times = note["kernel_times"]
    if not times:
        return f"kernel: {note['kernel']}"
    rows = sorted({time["rows"] for time in times})
    lines = [f"{'linears of a layer, ms':<24}" + "".join(f"{pluralize(count, 'row'):>12}" for count in rows)]
    for kernel, bits in dict.fromkeys((time["kernel"], time["bits"]) for time in times):
        found = {time["rows"]: time["seconds"] for time in times if (time["kernel"], time["bits"]) == (kernel, bits)}
        lines.append(f"{f'{kernel} {bits} bits':<24}" + "".join(f"{1e3 * found[count]:>12.2f}" for count in rows))
    return "\n".join([*lines, f"kernel: {note['kernel']}"])


def format_errors(pairs: Iterable[TimePair]) -> str:
    """Mean and worst absolute relative error, and the bias, by device, phase and width."""
    groups: dict[tuple[str, str, str], list[TimePair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.device, pair.phase, pair.bits].append(pair)
    rows = []
    for (device, phase, bits), members in groups.items():
        errors = [pair.error for pair in members]
        worst = max(members, key=lambda pair: abs(pair.error))
        rows.append(
            [
                device,
                phase,
                bits,
                str(len(members)),
                format_percent(_mean(map(abs, errors)), ".1"),
                format_percent(worst.error, "+.1"),
                format_percent(_mean(errors), "+.1"),
                f"{format_milliseconds(worst.predicted_seconds)} / {format_milliseconds(worst.measured_seconds)}",
            ]
        )
    head = ["device", "phase", "bits", "points", "mean error", "worst", "bias", "worst: predicted / measured ms"]
    return format_table(head, rows)


def verdict(pairs: Sequence[TimePair], what: str, remedy: str = "profile again") -> str:
    """`remedy`: what to do, with nothing else running, where times are off."""
    mean = _mean(abs(pair.error) for pair in pairs)
    worst = max(abs(pair.error) for pair in pairs)
    average, most = (format_percent(error, ".1") for error in (mean, worst))
    said = f"Predictions of {what} are off by {average} on average and {most} at worst: "
    if mean <= TRUSTED:
        return said + "plans made from them can be trusted to about that much."
    if mean <= USABLE:
        return said + f"good enough to rank plans, not to promise times; {remedy} with nothing else running."
    return said + f"do not trust a plan's times; {remedy} with nothing else running."


def judge_run(metrics: dict[str, Any], pairs: Sequence[TimePair]) -> str:
    """The verdict that the run itself ended with. Without totals, as after too many passes to simulate, its passes'."""
    if metrics["predicted_against_measured"]:
        return judge_metrics(metrics)
    return verdict(pairs, "the run's passes", "profile this model on these devices and run again,")


def pair_run(folder: Path) -> list[TimePair]:
    """Mean predicted and measured seconds of a run's passes, by stage and phase."""
    with refuse_other_forms(folder / "metrics.json"):
        metrics, plan = _json(folder / "metrics.json"), _json(folder / "plan.json")
        pairs = []
        for stage in metrics["stages"]:
            bits = "/".join(map(str, sorted(set(plan["stages"][stage["stage"]]["bits"]))))
            for phase, entry in stage["pass_seconds"].items():
                if entry["measured"] and entry["predicted"]:
                    name = f"{stage['stage']} {stage['device']}"
                    pairs.append(TimePair(name, phase, bits, entry["predicted"], entry["measured"]))
    if not pairs:
        raise UserError(f"{folder / 'metrics.json'} holds no timed pass; give the folder of a finished run")
    return pairs


def describe_run(folder: Path) -> str:
    """The table of a run's passes, its totals, its memory, and the verdict."""
    return "\n".join([*compare_run(folder), judge_run(_json(folder / "metrics.json"), pair_run(folder))])


def compare_run(folder: Path) -> list[str]:
    """What `describe_run` has, without the verdict."""
    pairs = pair_run(folder)
    with refuse_other_forms(folder / "metrics.json"):
        metrics = _json(folder / "metrics.json")
        totals = metrics["predicted_against_measured"] or {}
        lines = [_describe_total(phase, totals[f"{phase}_seconds"]) for phase in totals and TIMED]
        memory = [row for stage in metrics["stages"] for row in _compare_memory(stage)]
    head = ["stage", "memory", "predicted bytes", "measured bytes", "error"]
    return [format_errors(pairs), *lines, format_table(head, memory)]


def _describe_total(phase: str, entry: dict[str, float]) -> str:
    # one-token answers have no decode, neither predicted nor measured
    error = f" ({_describe_error(entry['predicted'], entry['measured'])})" if entry["measured"] else ""
    return f"{phase}: predicted {entry['predicted']:.3f} s, measured {entry['measured']:.3f} s{error}"


def _compare_memory(stage: dict[str, Any]) -> list[list[str]]:
    predicted, measured = stage["memory_bytes"]["predicted"], stage["memory_bytes"]["measured"]
    held = predicted["weights"] + predicted["embed"] + predicted["head"]
    parts = (
        ("weights", held, measured["weights"]),
        ("kv", predicted["kv"], measured["kv"]),
        ("peak growth", predicted["total"], measured["peak_growth"]),
    )
    return [
        [str(stage["stage"]), name, f"{p:,.0f}", f"{m:,.0f}", _describe_error(p, m) if m else "-"]
        for name, p, m in parts
    ]


def _describe_error(predicted: float, measured: float) -> str:
    return format_percent(predicted / measured - 1.0, "+.1")


def scatter(pairs: Sequence[TimePair], file: Path, title: str) -> None:
    """Plots predicted against measured times on logarithmic axes, with a colour for each device and phase, and lines at
    equality and +-10 %."""
    from matplotlib.ticker import LogLocator

    figure, ((axes,),) = figures.make_figure(width=6.4, height=6.0)
    groups: dict[tuple[str, str], list[TimePair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.device, pair.phase].append(pair)
    for (device, phase), members in groups.items():
        measured = [1e3 * pair.measured_seconds for pair in members]
        predicted = [1e3 * pair.predicted_seconds for pair in members]
        axes.scatter(measured, predicted, s=14, alpha=0.7, label=f"{device}, {phase}")
    times = [1e3 * time for pair in pairs for time in (pair.measured_seconds, pair.predicted_seconds) if time > 0]
    ends = [0.8 * min(times), 1.25 * max(times)]
    for factor, style in ((1.0, "-"), (0.9, ":"), (1.1, ":")):
        axes.plot(ends, [factor * end for end in ends], style, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted (ms)", title=title)
    for axis in (axes.xaxis, axes.yaxis):  # 20, 50, 100, not 2 x 10^1
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(fontsize="small")
    figures.save_figure(figure, file)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _json(path: Path) -> dict[str, Any]:
    found = read_metrics(path)
    if found is None:
        raise UserError(f"{path} cannot be read (it is not there); {REMEDY}.")
    return found
