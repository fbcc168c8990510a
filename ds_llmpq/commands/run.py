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
from ds_llmpq.wording import pluralize

MOST_LINES = 10  # of a run in which nothing happened that the user should know, all but progress


def run(settings: RunConfig, out: Path) -> int:
    describe = format_plan if settings.verbose else describe_plan
    settings = config.load_cluster(settings)
    page = _Page()
    done = run_batch(settings, out, Screen(page.show, lambda plan: page.show(describe(plan)), make_progress_callback()))
    _print_end(done, settings, out, page)
    return SOME_FAILED if done.tally.failed else 0


class _Page:
    """Prints and counts lines. A line on what the plan's times come from, and one on the devices that were found, are
    printed elsewhere."""

    def __init__(self) -> None:
        self.lines = 2

    def show(self, text: str) -> None:
        print(text, flush=True)
        self.lines += text.count("\n") + 1


def _print_end(done: BatchRun, settings: RunConfig, out: Path, page: _Page) -> None:
    counts, results = done.tally, out / "results.jsonl"
    if done.metrics is None:
        page.show(f"{out} is finished: {_describe_counts(counts)}; nothing is left to do.")
        return
    head, *lines = format_run(done.metrics, settings.verbose).splitlines()
    page.show("\n".join([f"{head}; results: {results}", *lines]))
    if counts.failed:
        page.show(f"{pluralize(counts.failed, 'request')} failed; the reasons are in {out / 'errors.jsonl'}")
    if done.restarts:
        page.show(f"the pipeline was started again {pluralize(done.restarts, 'time')} ({'; '.join(done.reasons)})")
    for answer in show_answers(config.make_absolute(settings.input), results, min(3, max(1, MOST_LINES - page.lines))):
        page.show(f"answer {answer}")


def _describe_counts(tally: Tally) -> str:
    return f"{pluralize(tally.total, 'request')}, {tally.completed} completed, {tally.failed} failed"
