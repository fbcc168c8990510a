"""`evaluate`: what a plan's widths cost in quality, measured on the pipeline itself, beside what was predicted."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.report.scores_table import format_scores
from ds_llmpq.report.solver_progress import make_progress_callback
from ds_llmpq.serving.config import EvaluateConfig
from ds_llmpq.serving.evaluation_run import run_evaluation


def run(settings: EvaluateConfig, out: Path) -> int:
    found = run_evaluation(config.load_cluster(settings), out, make_progress_callback())
    print(format_scores(found))
    print(f"scores: {out / 'scores.json'}")
    return 0
