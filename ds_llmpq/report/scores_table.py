"""The table that `evaluate` prints."""

from __future__ import annotations

from typing import Any

from ds_llmpq.report.plan_table import format_table
from ds_llmpq.wording import format_number


def format_scores(found: dict[str, Any]) -> str:
    """scores.json of a text or of tasks as a table."""
    return _tasks_table(found["tasks"]) if "tasks" in found else _text_table(found)


def _text_table(found: dict[str, Any]) -> str:
    rows = [
        ["tokens scored", str(found["tokens"])],
        ["loss (nats per token)", f"{found['nats_per_token']:.5f}"],
        ["perplexity per token", f"{found['perplexity_per_token']:.4f}"],
        ["perplexity per word", format_number(found["perplexity_per_word"], 4)],
    ]
    if "kl_nats_per_token" in found:
        rows += [
            ["perplexity per token at 16 bits", f"{found['reference']['perplexity_per_token']:.4f}"],
            ["KL to 16 bits (nats per token)", f"{found['kl_nats_per_token']:.6f}"],
            ["same most likely token as 16 bits", f"{found['top1_agreement']:.2%}"],
        ]
    if increase := found.get("loss_increase"):
        measured = f"{increase['measured']:.6f} +- {increase['standard_error']:.6f}"
        rows += [["loss increase, measured", measured]]
        rows += [["loss increase, predicted", f"{increase['predicted']:.6f} ({increase['predicted_from']})"]]
        if interval := increase.get("predicted_interval"):
            rows += [["95 % of texts", f"{interval[0]:.6f} to {interval[1]:.6f}"]]
    return format_table(["", "value"], rows)


def _tasks_table(tasks: dict[str, dict[str, Any]]) -> str:
    rows = [
        [task, name.partition(",")[0], f"{value:.4f}"]
        for task, values in tasks.items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    ]
    return format_table(["task", "metric", "value"], rows)
