"""`evaluate`: what a plan's bit widths cost in quality, measured on its pipeline and compared with the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.report.solver_progress import make_progress_callback
from ds_llmpq.serving.config import EvaluateConfig
from ds_llmpq.serving.evaluation_run import run_evaluation
from ds_llmpq.wording import format_number


def run(settings: EvaluateConfig, out: Path) -> int:
    found = run_evaluation(config.load_cluster(settings), out, make_progress_callback())
    print(_format_tasks(found["tasks"]) if "tasks" in found else _format_text(found))
    print(f"scores: {out / 'scores.json'}")
    return 0


def _format_text(found: dict[str, Any]) -> str:
    rows = [
        ["tokens scored", f"{found['tokens']:,}"],
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
    elif "loss_increase" in found:
        return format_table(["", "value"], [*rows, ["nothing is quantized", "so there is nothing to compare with"]])
    if increase := found.get("loss_increase"):
        measured = f"{increase['measured']:.6f} +- {increase['standard_error']:.6f}"
        rows += [["loss increase, measured", measured]]
        rows += [["loss increase, predicted", f"{increase['predicted']:.6f} ({increase['predicted_from']})"]]
        if interval := increase.get("predicted_interval"):
            rows += [["predicted for 95 % of texts", f"{interval[0]:.6f} to {interval[1]:.6f}"]]
    return format_table(["", "value"], rows)


def _format_tasks(tasks: dict[str, dict[str, Any]]) -> str:
    rows = [
        [task, name.partition(",")[0], f"{value:.4f}"]
        for task, values in tasks.items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    ]
    return format_table(["task", "metric", "value"], rows)
