"""Reports on a run, or on a plan that was not run, in report.html, pictures and report.txt: the plan and what
happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.plan import MEMORY_PARTS, Plan, read_plan
from ds_llmpq.report import fidelity, run_figures
from ds_llmpq.report.metrics_file import look_up, read_metrics, refuse_other_forms
from ds_llmpq.report.page import Section, render_page
from ds_llmpq.report.plan_table import (
    describe_cost,
    format_bits,
    format_milliseconds,
    format_plan,
    name_baseline,
    predict_cost,
)
from ds_llmpq.report.run_summary import format_run
from ds_llmpq.report.traces import gantt, read_trace
from ds_llmpq.wording import format_number, format_percent, format_size, pluralize

_PAIRS = "predicted_against_measured"
_SIDES = ("predicted", "measured")


def write_run_report(folder: Path, out: Path) -> str:
    """Writes report.html, report.txt and the pictures into `out`; returns the text.

    `folder` holds plan.json; metrics.json, trace.json, predicted_trace.json and scores.json are used if they are there.
    `UserError`: no plan, or a file of another form.
    """
    if not (folder / "plan.json").is_file():
        raise UserError(f"{folder} holds no plan.json; give the folder of a run or of a plan.")
    plan = read_plan(folder / "plan.json")
    metrics, scores = read_metrics(folder / "metrics.json"), read_metrics(folder / "scores.json")
    out.mkdir(parents=True, exist_ok=True)
    with refuse_other_forms(folder / "metrics.json"):
        sections = [
            _summary(plan, metrics, scores),
            _gantt(folder, out),
            _memory(plan, metrics, out),
            _bits(plan, out),
            _phases(plan, metrics, out),
            _fidelity(folder, metrics, out),
            _baselines(plan, out),
            _origins(plan),
        ]
        text = _text(plan, metrics, folder)
    lead = f"{folder.resolve().name}: what was planned, and what happened."
    (out / "report.html").write_text(render_page("A run against its plan", lead, sections), encoding="utf-8")
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")
    return text


def _text(plan: Plan, metrics: dict[str, Any] | None, folder: Path) -> str:
    parts = [format_plan(plan)]
    if metrics is not None:
        parts += ["", format_run(metrics)]
        if _has_timed_passes(metrics):
            # format_run has the verdict, where there is one
            compared = fidelity.compare_run(folder) if metrics[_PAIRS] else [fidelity.describe_run(folder)]
            parts += ["", *compared]
    return "\n".join(parts)


def _summary(plan: Plan, metrics: dict[str, Any] | None, scores: dict[str, Any] | None) -> Section:
    predicted, workload = plan.predicted, plan.workload
    tokens, loss = predicted.throughput_tokens_per_second, predicted.quality_loss
    served = _show(metrics, "measured", "throughput_tokens_per_second")
    rows = [
        ["throughput, tokens/s", format_number(tokens, 4), _show_predicted_rate(metrics), served],
        ["quality loss, nats per token", format_number(loss), "", _show(scores, "loss_increase", "measured")],
    ]
    if plan.bits_per_weight is not None:
        rows.append(["bits per weight, all counted", f"{plan.bits_per_weight:.2f}", "", ""])
    for name in fidelity.TIMED:
        planned = format_number(getattr(predicted, f"{name}_seconds"), 4)
        rows.append([f"{name}, s", planned, *(_show(metrics, _PAIRS, f"{name}_seconds", side) for side in _SIDES)])
    if (cost := predict_cost(plan)) is not None:
        measured = (metrics or {}).get("cost")
        rows.append(["cost", describe_cost(cost), "", describe_cost(measured) if measured else ""])
    proof = f", {plan.solver.proof}" if plan.solver.proof else ""
    section = Section(
        "summary",
        "Summary",
        f"Planned for {pluralize(workload.sequences, 'sequence')} of {workload.prompt_tokens} + "
        f"{workload.generated_tokens} tokens, in micro-batches of {plan.micro_batch.prefill} in prefill and "
        f"{plan.micro_batch.decode} in decode; "
        f"solved by {plan.solver.name} in {format_number(plan.solver.seconds)} s ({plan.solver.status}{proof}). "
        "The run may have had other lengths.",
    )
    if metrics is not None:
        section.sentences(format_run(metrics).splitlines())
    section.table(["", "planned", "predicted for this run", "measured"], rows)
    stages = [
        [
            str(index),
            stage.device,
            stage.device_type,
            f"layers {stage.layers[0]} to {stage.layers[1] - 1}",
            format_bits(stage.bits),
            format_milliseconds(stage.prefill_seconds),
            format_milliseconds(stage.decode_seconds),
        ]
        for index, stage in enumerate(plan.stages)
    ]
    return section.table(["stage", "device", "type", "layers", "bits", "prefill ms", "decode ms"], stages)


def _show_predicted_rate(metrics: dict[str, Any] | None) -> str:
    """Tokens/s of the answers as they turned out, at the predicted times."""
    found = (metrics or {}).get(_PAIRS)
    seconds = found and found["latency_seconds"]["predicted"]
    return format_number(metrics["measured"]["generated_tokens"] / seconds, 4) if metrics and seconds else ""


def _gantt(folder: Path, out: Path) -> Section:
    traces = {"predicted": read_trace(folder / "predicted_trace.json"), "measured": read_trace(folder / "trace.json")}
    found = {name: spans for name, spans in traces.items() if spans}
    section = Section(
        "gantt",
        "Stages in time",
        "What each stage did when: the schedule simulated with the planned times, and the trace of the run.",
    )
    if not found:
        return section.sentences(["There is neither predicted_trace.json nor trace.json."])
    return section.picture(gantt(found, out / "gantt.png"), "Gantt chart of the stages, predicted and measured")


def _memory(plan: Plan, metrics: dict[str, Any] | None, out: Path) -> Section:
    stages = metrics["stages"] if metrics else []
    measured = [stage["memory_bytes"]["measured"] for stage in stages] or None
    rows = []
    for index, stage in enumerate(plan.stages):
        needed = stage.memory_bytes.total
        held = measured[index] if measured else {}
        rows.append(
            [
                str(index),
                stage.device,
                *(format_size(value) for value in stage.memory_bytes.by_part().values()),
                format_size(needed),
                format_size(stage.memory_budget_bytes),
                format_percent(needed / stage.memory_budget_bytes) if stage.memory_budget_bytes else "",
                *(
                    format_size(held[name]) if held.get(name) is not None else ""
                    for name in ("weights", "kv", "peak_growth")
                ),
            ]
        )
    head = ["stage", "device", *MEMORY_PARTS, "needed", "budget", "used"]
    head += ["measured weights", "measured kv", "measured peak growth"]
    return (
        Section(
            "memory",
            "Memory",
            "By part and device, against the budget; hatched bars are measured. Peak growth is that of the whole "
            "process: on CPUs it holds what libraries keep for themselves, which counts beside small models alone.",
        )
        .picture(run_figures.plot_memory(plan, measured, out / "memory.png"), "memory by part against budget")
        .table(head, rows)
    )


def _bits(plan: Plan, out: Path) -> Section:
    return Section(
        "bits", "Bits by layer", "The bit width of every decoder layer, in the colour of its stage."
    ).picture(run_figures.plot_bits(plan, out / "bits.png"), "bits of each layer")


def _phases(plan: Plan, metrics: dict[str, Any] | None, out: Path) -> Section:
    if metrics is None or not metrics["stages"]:
        picture = run_figures.plot_predicted_phases(plan, out / "phases.png")
        why = "this plan was not run" if metrics is None else "its run was not measured"
        lead = f"Predicted work of each stage over a whole batch; {why}."
    else:
        picture = run_figures.plot_phases([stage["seconds"] for stage in metrics["stages"]], out / "phases.png")
        lead = "Where the time of each stage went, as measured: work by phase, then waiting."
    return Section("phases", "Time by phase", lead).picture(picture, "seconds by phase and stage")


def _fidelity(folder: Path, metrics: dict[str, Any] | None, out: Path) -> Section:
    section = Section("fidelity", "Fidelity", "Predicted and measured times of a pass, by stage and phase.")
    if metrics is None or not _has_timed_passes(metrics):
        reason = "this plan was not run" if metrics is None else "no pass was timed"
        return section.sentences([f"There is nothing to compare: {reason}."])
    pairs = fidelity.pair_run(folder)
    fidelity.scatter(pairs, out / "fidelity.png", "Passes of a run: plan against measurement")
    section.picture(out / "fidelity.png", "predicted against measured").text(fidelity.format_errors(pairs))
    return section.sentences([fidelity.judge_run(metrics, pairs)])


def _baselines(plan: Plan, out: Path) -> Section:
    section = Section("baselines", "Baselines", "Predicted with the same costs, each at its best micro-batches.")
    if (picture := run_figures.plot_baselines(plan, out / "baselines.png")) is not None:
        section.picture(picture, "tokens/s of baselines")
    ours = plan.predicted.throughput_tokens_per_second
    rows = [
        [name_baseline(name), "", "", "", entry]
        if isinstance(entry, str)
        else [
            name_baseline(name),
            format_number(entry.throughput_tokens_per_second, 4),
            f"{ours / entry.throughput_tokens_per_second:.2f}",
            format_number(entry.quality_loss),
            "",
        ]
        for name, entry in plan.baselines.items()
    ]
    return section.table(["baseline", "tokens/s", "speed-up over it", "quality loss", "why none"], rows)


def _origins(plan: Plan) -> Section:
    return (
        Section("origins", "Where the numbers come from", "The sources that the plan names, and its explanation.")
        .table(["number", "origin"], [[name, origin] for name, origin in plan.provenance.items()])
        .table(["note"], [[sentence] for sentence in plan.explanation])
    )


def _has_timed_passes(metrics: dict[str, Any]) -> bool:
    return any(entry.get("measured") for stage in metrics["stages"] for entry in stage["pass_seconds"].values())


def _show(record: dict[str, Any] | None, *names: str) -> str:
    return "" if (value := look_up(record, *names)) is None else format_number(value, 4)
