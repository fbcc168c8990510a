"""Runs a job on one rank: loads its stage of the plan, and answers requests or scores given tokens.

Rank 0, the driver, reads and writes all files; the other ranks only run their stage.
"""

from __future__ import annotations

import gc
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from ds_llmpq.batch.detokenizer import build_stop_rule
from ds_llmpq.engine.preflight import check_memory
from ds_llmpq.engine.rank_context import RankContext, init_rank, shutdown
from ds_llmpq.engine.session import Session
from ds_llmpq.evaluation.config import SCORES_NAME
from ds_llmpq.evaluation.perplexity import TextRows
from ds_llmpq.evaluation.scoring import ScoringRounds, TargetScorer
from ds_llmpq.files import write_json
from ds_llmpq.launch.heartbeat import Heartbeat
from ds_llmpq.launch.progress import ProgressLines
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.plan import check_model
from ds_llmpq.serving.driver import Driver
from ds_llmpq.serving.job import Job


def serve(job: Job) -> dict[str, Any] | None:
    """Joins the other ranks and runs a job to its end. Returns the metrics on the driver of requests, else None.
    `UserError` on the rank that finds a mistake; the launcher then ends the others."""
    context = init_rank(job.plan, job.engine.timeout_seconds)
    check_model(job.plan, job.model_path)
    with closing(Heartbeat(job.hang_seconds, None if job.supervised else lambda: None)) as heartbeat:
        found = (_answer if job.scoring is None else _score)(job, context, heartbeat)
    shutdown()  # not after a failure: the others may be waiting, and a closed connection tells them at once
    return found


def _answer(job: Job, context: RankContext, heartbeat: Heartbeat) -> dict[str, Any] | None:
    """Requests in, results out."""
    rule = build_stop_rule(job.model_path, load_tokenizer(job.model_path, job.trust_remote_code, job.template_time))
    driver = Driver(job, rule, heartbeat) if context.is_driver else None
    with driver or nullcontext():
        if job.engine.check_memory:
            check_memory(job.plan, context, job.memory_wait_seconds)
        loading = driver.show_loading if driver else heartbeat.beat
        session = Session(job.plan, context, job.model_path, rule, loading, job.trust_remote_code, job.engine)
        heartbeat.watch(lambda: session.trace.spans)
        gc.collect()
        gc.freeze()  # else a full collection would stop a pass for 0.2 s, the first one as a rule
        if driver:
            take = driver.begin_serving(session)
            session.run_all(take, driver.write_result, driver.write_error, driver.on_tokens)
        else:
            session.share_prefix()
            session.run_all(lambda: None, lambda *ended: None)
        reports = context.data.gather(session.report() | {"trace": session.trace.list_spans()})
        return driver.conclude(session, reports) if driver else None


def _score(job: Job, context: RankContext, heartbeat: Heartbeat) -> None:
    """Scores of a text or of tasks, as scores.json."""
    settings, model = job.scoring.settings, (job.model_path, job.trust_remote_code)
    text = TextRows(settings, *model) if context.is_driver and not settings.tasks else None
    with closing(TargetScorer(job.scoring, context.rank == context.stage_ranks[-1])) as scorer:
        session = Session(
            job.plan, context, job.model_path, None, heartbeat.beat, job.trust_remote_code, job.engine, scorer
        )
        heartbeat.watch(lambda: session.trace.spans)
        rounds = ScoringRounds(session, scorer)
        if not context.is_driver:
            rounds.follow()
            return
        show = ProgressLines().show
        if text is None:
            from ds_llmpq.evaluation.harness import score_tasks

            found = score_tasks(settings, *model, rounds, show)
        else:
            found = text.score(rounds, show)
        rounds.done()
        write_json(Path(job.output) / SCORES_NAME, found)
