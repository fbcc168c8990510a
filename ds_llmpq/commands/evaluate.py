"""`evaluate`: what a plan's widths cost in quality, measured on the pipeline itself, beside what was predicted."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.report.scores_table import scores_table
from ds_llmpq.report.solver_progress import progress_line
from ds_llmpq.serving.config import EvaluateConfig
from ds_llmpq.serving.evaluation_run import run_evaluation


def run(settings: EvaluateConfig, out: Path) -> int:
    found = run_evaluation(config.load_cluster(settings), out, progress_line())
    print(scores_table(found))
    print(f"scores: {out / 'scores.json'}")
    return 0
