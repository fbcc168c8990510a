"""Summarizes a run in a few lines: counts, speed, and what the plan predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_llmpq.report.plan_table import describe_cost, format_table
from ds_llmpq.wording import format_number, format_percent, format_size, pluralize

TRUSTED = 0.15  # a run that is at most so far off confirms the plan's times
_SHORTEST = 0.25  # seconds of a run, below which its first passes and pauses of the machine are most of it
# other programs slowed a run where they had the first share of a host's processors, and all together the second
_OTHERS, _CROWDED = 0.1, 0.85
RANKING = 1.0  # at most a factor of two: such errors are alike for all plans of a model and machine


def format_run(metrics: dict[str, Any], verbose: bool = False) -> str:
    """`metrics` as in metrics.json. `verbose` adds a line for each stage."""
    counts, measured = metrics["counts"], metrics["measured"]
    lines = [f"requests: {counts['total']} in all, {counts['completed']} completed, {counts['failed']} failed"]
    if not metrics["stages"]:
        return "\n".join([*lines, "measured: nothing; the pipeline that served the last rows ended before it reported"])
    lines.append(
        f"measured: {_number(measured['throughput_tokens_per_second'])} tokens/s, "
        f"{measured['generated_tokens']:,} tokens in {measured['serving_seconds']:.2f} s "
        f"(prefill {_number(measured['prefill_tokens_per_second'])} tokens/s, decode "
        f"{_number(measured['decode_tokens_per_second'])}); loaded in {measured['startup_seconds']:.1f} s"
    )
    if shared := measured.get("shared_tokens"):
        lines[-1] += f"; {shared:,} of {measured['prompt_tokens']:,} prompt tokens shared, not computed again"
    if preemptions := measured.get("preemptions"):
        again = f"{measured['recomputed_tokens']:,} tokens computed again"
        lines[-1] += f"; {pluralize(preemptions, 'preemption')}, {again}"
    lines += compare_with_plan(metrics)
    if cost := metrics.get("cost"):
        lines.append(f"cost while serving: {describe_cost(cost)}")
    if verbose:
        lines.append(_stages(metrics["stages"]))
    if warnings := metrics.get("memory_warnings"):
        lines.append(
            f"memory ran out {pluralize(len(warnings), 'time')}, and the run went on with less at a time; "
            "metrics.json says where (memory_warnings)"
        )
    return "\n".join(lines)


def compare_with_plan(metrics: dict[str, Any]) -> list[str]:
    """The plan's figures for these very requests and answers, in the units of the measured ones; what was expected, if
    answers had other lengths; and a verdict."""
    found = metrics["predicted_against_measured"]
    if not found:
        return ["predicted: no figures, since nothing ran to its end or the passes were too many to simulate"]
    measured = metrics["measured"]
    tokens = {
        "latency": measured["generated_tokens"],
        "prefill": measured.get("prefill_tokens", measured["prompt_tokens"]),
        "decode": measured["generated_tokens"] - measured["rows"],
    }
    pairs = {phase: found[f"{phase}_seconds"] for phase in tokens}
    rates = {
        phase: _number(tokens[phase] / seconds if (seconds := pair["predicted"]) else None)
        for phase, pair in pairs.items()
    }
    before = found.get("expected_before")
    if before and before["rows"] == measured["rows"] and before["generated_tokens"] != measured["generated_tokens"]:
        expected = (
            f"; expected before the run: {before['latency_seconds']:.2f} s for {before['generated_tokens']:,} tokens"
        )
    else:
        expected = ""
    return [
        f"predicted: {rates['latency']} tokens/s, in {pairs['latency']['predicted']:.2f} s "
        f"(prefill {rates['prefill']} tokens/s, decode {rates['decode']}){expected}",
        judge_metrics(metrics),
    ]


def judge_metrics(metrics: dict[str, Any]) -> str:
    """`judge_times` of a run that was compared with its plan, and whether other programs disturbed it."""
    found = metrics["predicted_against_measured"]
    pairs = {phase: found[f"{phase}_seconds"] for phase in ("latency", "prefill", "decode")}
    return f"verdict: {judge_times(pairs)}{_name_others(metrics.get('hosts', ()))}"


def _name_others(hosts: Sequence[dict[str, Any]]) -> str:
    """What to make of the verdict where other programs had much of a host that had little left."""
    for host in hosts:
        own, others = host["own_share"] or 0.0, host["others_share"] or 0.0
        if others >= _OTHERS and own + others >= _CROWDED:
            return (
                f"; other programs had {format_percent(others)} of the processors of {host['host']} meanwhile, measured"
            )
    return ""


def judge_times(pairs: dict[str, dict[str, float | None]]) -> str:
    """A sentence on how far off the whole run was, and because of which phase, or of what lies between passes. A ratio
    is measured over predicted seconds; None if a phase has no work, like decode in answers of one token."""
    ratio = pairs["latency"]["ratio"]
    if ratio is None:
        return "nothing was predicted to take any time"
    if max(pairs["latency"]["predicted"], pairs["latency"]["measured"]) < _SHORTEST:
        return f"{pairs['latency']['measured']:.3f} s are too short a run to judge the plan's times by"
    off = max(ratio, 1 / ratio) - 1
    if off <= TRUSTED:
        return f"the run took {ratio:.2f} times as long as predicted: the plan's times hold"
    # what a phase took too long, or was too fast if the whole run was
    sign = 1 if ratio > 1 else -1
    excess = {name: sign * (pair["measured"] - pair["predicted"]) for name, pair in pairs.items() if pair["ratio"]}
    excess["between passes"] = 2 * excess["latency"] - sum(excess.values())
    del excess["latency"]
    worst = max(excess, key=lambda name: excess[name])
    if worst in pairs:
        cause = f"{worst} {pairs[worst]['ratio']:.2f} times"
    else:
        cause = f"{excess[worst]:.2f} s {'more' if sign > 0 else 'less'} between passes"
    use = "good for ranking plans, not as absolute figures" if off <= RANKING else "do not trust them"
    return f"the run took {ratio:.2f} times as long as predicted ({cause}): the plan's times are off; {use}"


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
    return "-" if value is None else format_number(value, 4)
