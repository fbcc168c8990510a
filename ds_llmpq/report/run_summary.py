"""What a run did, in a few lines: counts, speed, and the plan's prediction beside the measurement."""

from __future__ import annotations

from typing import Any

from ds_llmpq.report.plan_table import format_size, format_table


def run_summary(metrics: dict[str, Any]) -> str:
    """`metrics` as in metrics.json."""
    counts, measured = metrics["counts"], metrics["measured"]
    lines = [f"requests: {counts['total']} in all, {counts['completed']} completed, {counts['failed']} failed"]
    if not metrics["stages"]:
        return "\n".join([*lines, "measured: nothing; the pipeline that served the last rows ended before it reported"])
    lines.append(
        f"measured: prefill {_number(measured['prefill_tokens_per_second'])} tokens/s, decode "
        f"{_number(measured['decode_tokens_per_second'])} tokens/s, {measured['generated_tokens']} tokens generated in "
        f"{measured['serving_seconds']:.2f} s; start-up {measured['startup_seconds']:.1f} s"
    )
    fidelity = metrics["predicted_against_measured"]
    if fidelity:
        for phase in ("latency", "prefill", "decode"):
            entry = fidelity[f"{phase}_seconds"]
            # one-token answers have no decode, neither predicted nor measured
            ratio = "" if entry["ratio"] is None else f" (measured is {entry['ratio']:.2f}x)"
            pair = f"{entry['predicted']:.3f} s against {entry['measured']:.3f} s"
            lines.append(f"predicted against measured {phase}: {pair}{ratio}")
    else:
        lines.append("predicted against measured: nothing ran that the prediction can be held against")
    lines.append(_stages(metrics["stages"]))
    if warnings := metrics.get("memory_warnings"):
        lines.append(
            f"memory ran out {len(warnings)} times, and the run went on with less at a time; "
            "metrics.json says where (memory_warnings)"
        )
    return "\n".join(lines)


def _stages(stages: list[dict[str, Any]]) -> str:
    head = [
        "stage",
        "device",
        "weights predicted",
        "measured",
        "kv predicted",
        "measured",
        "peak growth",
        "busy s",
        "waiting s",
    ]
    rows = []
    for stage in stages:
        predicted, measured = stage["memory_bytes"]["predicted"], stage["memory_bytes"]["measured"]
        weights = predicted["weights"] + predicted["embed"] + predicted["head"]
        waiting = sum(seconds for name, seconds in stage["seconds"].items() if name.startswith("wait_"))
        busy = sum(stage["seconds"].values()) - waiting
        rows.append(
            [
                str(stage["stage"]),
                stage["device"],
                format_size(weights),
                format_size(measured["weights"]),
                format_size(predicted["kv"]),
                format_size(measured["kv"]),
                format_size(measured["peak_growth"]),
                f"{busy:.2f}",
                f"{waiting:.2f}",
            ]
        )
    return format_table(head, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
