"""metrics.json: what a run did and how that compares with its plan. Every number says where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ds_llmpq.plan import Plan
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.simulator import SimulatedRun
from ds_llmpq.serving.prediction import LengthsOfStream, simulate_run, sum_seconds

if TYPE_CHECKING:
    from ds_llmpq.scheduler.stream import StreamTimes  # which imports torch

SCHEMA = 2
PHASES = ("prefill", "decode")


def summarize(
    plan: Plan,
    counts: dict[str, int],
    streams: Sequence[StreamTimes],
    reports: list[dict[str, Any]],
    startup_seconds: float,
    simulated: Sequence[SimulatedRun] | None = None,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`streams` as timed on the driver, and a report from each rank; both are empty if nothing ran or nothing was
    reported. `simulated`: the plan's times for these very streams. `expected`: what was expected before (`expect`).

    Prefill and decode overlap, so the seconds of a phase are those of the stage that worked longest on it. Prefill
    tokens/s counts the prompt tokens that were computed, and what was computed again of sequences that had been
    preempted for want of cache blocks; decode tokens/s all generated tokens except the first of each sequence. A shared
    prefix is computed once, and does not count as a row.
    """
    of_rows = [stream for stream in streams if not stream.of_prefix]
    prompt_tokens = sum(stream.prompt_tokens for stream in of_rows)
    shared_tokens = sum(stream.shared_tokens for stream in of_rows)
    recomputed = [tokens for stream in streams for tokens in stream.recomputed]
    prefill_tokens = sum(stream.prompt_tokens for stream in streams) - shared_tokens + sum(recomputed)
    generated_tokens = sum(stream.generated_tokens for stream in of_rows)
    rows = sum(len(stream.lengths) for stream in of_rows)
    seconds = sum(stream.seconds for stream in streams)
    phases = {phase: max((_work(report, phase) for report in reports), default=0.0) for phase in PHASES}
    first = None
    if of_rows:
        first = of_rows[0].first_token_seconds + sum(stream.seconds for stream in streams if stream.of_prefix)
    return {
        "schema": SCHEMA,
        "counts": counts,
        "measured": {
            "startup_seconds": startup_seconds,
            "serving_seconds": seconds,
            "time_to_first_token_seconds": None if first is None else startup_seconds + first,
            "rows": rows,
            "prompt_tokens": prompt_tokens,
            "prefill_tokens": prefill_tokens,
            "shared_tokens": shared_tokens,
            "preemptions": len(recomputed),
            "recomputed_tokens": sum(recomputed),
            "generated_tokens": generated_tokens,
            **{f"{phase}_seconds": work for phase, work in phases.items()},
            "prefill_tokens_per_second": _rate(prefill_tokens, phases["prefill"]),
            "decode_tokens_per_second": _rate(generated_tokens - rows, phases["decode"]),
            "throughput_tokens_per_second": _rate(generated_tokens, seconds),
        },
        "cost": plan.compute_cost(seconds, prompt_tokens, generated_tokens),  # while serving, start-up not counted
        "predicted_against_measured": simulated
        and _compare_times(plan, simulated, seconds, phases) | {"expected_before": expected},
        "stages": [
            _stage(plan, report, simulated or ()) for report in sorted(reports, key=lambda report: report["stage"])
        ],
        "memory_warnings": [warning for report in reports for warning in report["memory_warnings"]],
        "hosts": share_processors([report["processors"] for report in reports]),
        "provenance": dict(plan.provenance),
    }


def _compare_times(
    plan: Plan, simulated: Sequence[SimulatedRun], seconds: float, phases: dict[str, float]
) -> dict[str, Any]:
    """The plan's times for these very requests and answers, compared with the measured ones."""
    stages = range(len(plan.stages))
    predicted = {"latency_seconds": sum_seconds(simulated)} | {
        f"{phase}_seconds": max(sum(run.busy_seconds(stage, phase) for run in simulated) for stage in stages)
        for phase in PHASES
    }
    measured = {"latency_seconds": seconds} | {f"{phase}_seconds": work for phase, work in phases.items()}
    return {
        "planned_workload": asdict(plan.workload),
        "planned_throughput_tokens_per_second": plan.predicted.throughput_tokens_per_second,
        "lengths": "of the requests and answers of this run",
        **{
            name: {"predicted": predicted[name], "measured": value, "ratio": _rate(value, predicted[name])}
            for name, value in measured.items()
        },
    }


def expect(
    plan: Plan, streams: Sequence[LengthsOfStream], limits: MicroBatchLimits, prefix_tokens: int = 0
) -> dict[str, Any] | None:
    """What the plan's times predict for streams before any answer is known, and for a prefix computed before them; None
    if that is too much to simulate."""
    if (simulated := simulate_run(plan, streams, limits, prefix_tokens)) is None:
        return None
    lengths = [length for _, stream, *_ in streams for length in stream]
    return {
        "rows": len(lengths),
        "generated_tokens": sum(generated for _, generated in lengths),
        "latency_seconds": sum_seconds(simulated),
    }


def _stage(plan: Plan, report: dict[str, Any], simulated: Sequence[SimulatedRun]) -> dict[str, Any]:
    stage = plan.stages[report["stage"]]
    predicted = stage.memory_bytes.by_part()
    measured = report["memory_bytes"]
    return {
        **{
            name: report[name]
            for name in ("stage", "rank", "load_seconds", "seconds", "passes", "passes_ahead", "tokens")
        },
        "device": stage.device,
        "layers": list(stage.layers),
        "memory_bytes": {
            "predicted": predicted | {"total": stage.memory_bytes.total},
            "measured": measured,
            "budget": stage.memory_budget_bytes,
        },
        # means, because the passes of a run differ in size, and seldom have the planned one
        "pass_seconds": {
            phase: {
                "planned": getattr(stage, f"{phase}_seconds"),
                "predicted": _rate(
                    sum(run.busy_seconds(report["stage"], phase) for run in simulated),
                    sum(run.count_passes(report["stage"], phase) for run in simulated),
                ),
                "measured": _rate(_work(report, phase), report["passes"].get(phase, 0)),
            }
            for phase in PHASES
        },
    }


def share_processors(used: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each host's processors while it served: the shares of this run's ranks and of all other programs, measured."""
    found = []
    for host in dict.fromkeys(entry["host"] for entry in used):
        ranks = [entry for entry in used if entry["host"] == host]
        whole = max(entry["processors"] * entry["seconds"] for entry in ranks)
        own = sum(entry["own_seconds"] for entry in ranks)
        others = max(0.0, max(entry["busy_seconds"] for entry in ranks) - own)
        found.append({"host": host, "own_share": _rate(own, whole), "others_share": _rate(others, whole)})
    return found


def _work(report: dict[str, Any], phase: str) -> float:
    """Seconds of a stage's passes. The last stage's sampling is included, as in the predictions; the passes of both
    phases sample alike."""
    passes = {phase: report["passes"].get(phase, 0) for phase in PHASES}
    sampling = report["seconds"].get("sample", 0.0) * passes[phase] / max(1, sum(passes.values()))
    return report["seconds"].get(phase, 0.0) + sampling


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None
