"""`run`: plans if needed, starts DeepSpeed on the plan's hosts, supervises it, and sums up. Run again, it resumes."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.batch.results import Tally
from ds_llmpq.commands.serve import SOME_FAILED
from ds_llmpq.report.answers import show_answers
from ds_llmpq.report.plan_table import describe_plan, format_plan
from ds_llmpq.report.run_summary import format_run
from ds_llmpq.report.solver_progress import make_progress_callback
from ds_llmpq.serving.batch_run import BatchRun, Screen, run_batch
from ds_llmpq.serving.config import RunConfig


def run(settings: RunConfig, out: Path) -> int:
    describe = format_plan if settings.verbose else describe_plan
    screen = Screen(print, lambda plan: print(describe(plan), flush=True), make_progress_callback())
    done = run_batch(config.load_cluster(settings), out, screen)
    _print_end(done, config.make_absolute(settings.input), out, settings.verbose)
    return SOME_FAILED if done.tally.failed else 0


def _print_end(done: BatchRun, input_file: Path, out: Path, verbose: bool) -> None:
    if done.metrics is None:
        print(f"{out} is finished: {_describe_counts(done.tally)}; nothing is left to do.")
        return
    print(format_run(done.metrics, verbose))
    if done.restarts:
        print(f"the pipeline was started again {done.restarts} times ({'; '.join(done.reasons)})")
    if answers := show_answers(input_file, out / "results.jsonl"):
        print(f"the first answers:\n{answers}")
    print(f"results: {out / 'results.jsonl'}")
    if done.tally.failed:
        print(f"{done.tally.failed} requests failed; the reasons are in {out / 'errors.jsonl'}")


def _describe_counts(tally: Tally) -> str:
    return f"{tally.total} requests, {tally.completed} completed, {tally.failed} failed"
