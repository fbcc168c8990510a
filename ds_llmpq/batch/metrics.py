"""metrics.json: what a run did and how that compares with its plan. Every number says where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ds_llmpq.engine.pipeline_engine import WaveTimes
from ds_llmpq.planner.plan import Plan

SCHEMA = 1


def summarize(
    plan: Plan,
    counts: dict[str, int],
    waves: Sequence[WaveTimes],
    reports: list[dict[str, Any]],
    startup_seconds: float,
) -> dict[str, Any]:
    """`waves` as timed on the driver, `reports` one a rank.

    Prefill of a wave lasts until all its rows have their first token, decode from there until the last row is done:
    so prefill tokens/s counts prompt tokens, decode tokens/s all generated tokens but the first of each row.
    """
    total = {name: sum(getattr(wave, name) for wave in waves) for name in WaveTimes.SUMMED}
    seconds = total["prefill_seconds"] + total["decode_seconds"]
    return {
        "schema": SCHEMA,
        "counts": counts,
        "measured": {
            "startup_seconds": startup_seconds,
            "serving_seconds": seconds,
            "time_to_first_token_seconds": startup_seconds + waves[0].prefill_seconds if waves else None,
            **total,
            "prefill_tokens_per_second": _rate(total["prompt_tokens"], total["prefill_seconds"]),
            "decode_tokens_per_second": _rate(total["generated_tokens"] - total["rows"], total["decode_seconds"]),
            "throughput_tokens_per_second": _rate(total["generated_tokens"], seconds),
        },
        "predicted_against_measured": _fidelity(plan, waves),
        "stages": [_stage(plan, report) for report in sorted(reports, key=lambda report: report["stage"])],
        "provenance": dict(plan.provenance),
    }


def _fidelity(plan: Plan, waves: Sequence[WaveTimes]) -> dict[str, Any] | None:
    """The plan's batch against the mean of the full waves; lengths are given, for a wave is seldom exactly the plan's
    workload. None if no wave was full."""
    full = [wave for wave in waves if wave.rows == plan.workload.sequences]
    if not full:
        return None
    mean = {name: sum(getattr(wave, name) for wave in full) / len(full) for name in WaveTimes.SUMMED}
    measured = {
        "latency_seconds": mean["prefill_seconds"] + mean["decode_seconds"],
        "prefill_seconds": mean["prefill_seconds"],
        "decode_seconds": mean["decode_seconds"],
    }
    return {
        "workload": asdict(plan.workload),
        "measured_waves": len(full),
        "measured_mean_prompt_tokens": mean["prompt_tokens"] / plan.workload.sequences,
        "measured_mean_decode_rounds": mean["decode_rounds"],
        **{
            name: {"predicted": plan.predicted[name], "measured": value, "ratio": _rate(value, plan.predicted[name])}
            for name, value in measured.items()
        },
    }


def _stage(plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
    stage = plan.stages[report["stage"]]
    predicted = dict(stage.memory_bytes)
    measured = report["memory_bytes"]
    return {
        **{name: report[name] for name in ("stage", "rank", "load_seconds", "seconds", "passes", "tokens")},
        "device": stage.device,
        "layers": list(stage.layers),
        "memory_bytes": {
            "predicted": predicted | {"total": sum(predicted.values())},
            "measured": measured,
            "budget": stage.memory_budget_bytes,
        },
        "pass_seconds": {
            phase: {
                "predicted": getattr(stage, f"{phase}_seconds"),
                "measured": _rate(report["seconds"].get(phase, 0.0), report["passes"].get(phase, 0)),
            }
            for phase in ("prefill", "decode")
        },
    }


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None
