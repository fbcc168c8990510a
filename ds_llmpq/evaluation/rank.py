"""One rank of an evaluation. Rank 0 reads the text, asks for scores and writes scores.json; the others follow."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

from ds_llmpq.engine.rank_context import RankContext
from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.job import ScoreJob
from ds_llmpq.evaluation.rows import RowScore, ScoredRow
from ds_llmpq.evaluation.scoring import NoStop, Reference, ScoringSession
from ds_llmpq.launch.heartbeat import Heartbeat
from ds_llmpq.launch.progress import ProgressLines
from ds_llmpq.models.corpus import EVALUATION, cut_rows, encode, read_text
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.plan import check_model

SCORES_NAME = "scores.json"


def evaluate(job: ScoreJob, context: RankContext) -> None:
    """Raises `UserError` on the rank that meets a mistake; the launcher ends the others."""
    with closing(Heartbeat(job.hang_seconds)) as heartbeat:
        _evaluate(job, context, heartbeat)


def _evaluate(job: ScoreJob, context: RankContext, heartbeat: Heartbeat) -> None:
    check_model(job.plan, job.model_path)
    driver = TextScores(job) if context.is_driver and not job.evaluation.tasks else None
    session = ScoringSession(
        job.plan, context, job.model_path, NoStop(), heartbeat.beat, trust_remote_code=job.trust_remote_code
    )
    heartbeat.watch(lambda: session.trace.spans)
    targets = context.data.broadcast(str(driver.compared).encode() if driver else None)
    if job.reference and session.engine.is_last_stage() and int(targets or 0):
        vocabulary = read_shape(job.model_path).vocab
        session.engine.reference = Reference(Path(job.reference), int(targets), vocabulary, job.keeps_reference)
    if not context.is_driver:
        session.follow()
    else:
        found = driver.run(session) if driver else _harness(job, session)
        session.done()
        (Path(job.output) / SCORES_NAME).write_text(json.dumps(found, indent=1) + "\n")
    if session.engine.reference is not None:
        session.engine.reference.close()


def _harness(job: ScoreJob, session: ScoringSession) -> dict[str, Any]:
    from ds_llmpq.evaluation.harness import run_tasks

    return run_tasks(job, session)


class TextScores:
    """A text's rows and the sums over their scores."""

    def __init__(self, job: ScoreJob):
        settings, shape = job.evaluation, read_shape(job.model_path)
        tokenizer = load_tokenizer(job.model_path, job.trust_remote_code)
        self.text = read_text(settings.text, EVALUATION)
        rows = cut_rows(encode(self.text, tokenizer), _row_tokens(settings.row_tokens, shape))
        kept = spread(rows, settings.limit_tokens)
        self.words = self.text.words
        if len(kept) < len(rows):
            self.words = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).split()) for row in kept)
        most = settings.reference_bytes // (4 * shape.vocab) if job.reference else 0
        self.rows, self.compared = scored_rows(kept, most)

    def run(self, session: ScoringSession) -> dict[str, Any]:
        progress = ProgressLines()
        scores: list[RowScore] = []
        for score in session.scores(self.rows):
            scores.append(score)
            progress.show("score", len(scores), len(self.rows))
        return summary(scores, self.words) | {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "logprobs": [round(value, 6) for score in scores for value in score.logprobs],
        }


def spread(rows: list[list[int]], limit_tokens: int | None) -> list[list[int]]:
    """At most `limit_tokens` scored tokens in whole rows (at least one), taken evenly from all of the text."""
    if limit_tokens is None:
        return rows
    count = min(len(rows), max(1, limit_tokens // max(len(row) - 1 for row in rows)))
    return [rows[index * len(rows) // count] for index in range(count)]


def scored_rows(rows: list[list[int]], most_compared: int) -> tuple[list[ScoredRow], int]:
    """The rows and the number of targets that are compared with a reference: whole rows, at most `most_compared`."""
    scored, offset = [], 0
    for tokens in rows:
        compared = offset + len(tokens) - 1 <= most_compared
        scored.append(ScoredRow.of(tokens, offset=offset if compared else None))
        if compared:
            offset += len(tokens) - 1
        else:
            most_compared = 0
    return scored, offset


def summary(scores: list[RowScore], words: int) -> dict[str, Any]:
    """Loss in nats, perplexity per token and per word; KL per token and top-1 agreement where compared."""
    tokens = sum(len(score.logprobs) for score in scores)
    nats = -math.fsum(value for score in scores for value in score.logprobs)
    found: dict[str, Any] = {
        "tokens": tokens,
        "words": words,
        "nats_per_token": nats / tokens,
        "perplexity_per_token": math.exp(min(nats / tokens, 700.0)),
        "perplexity_per_word": math.exp(min(nats / max(words, 1), 700.0)),
        "top1_accuracy": sum(map(sum, (score.greedy for score in scores))) / tokens,
    }
    compared = [score for score in scores if score.kl is not None]
    if compared:
        count = sum(len(score.logprobs) for score in compared)
        found["compared_tokens"] = count
        found["kl_nats_per_token"] = math.fsum(score.kl for score in compared) / count
        found["top1_agreement"] = sum(score.agree for score in compared) / count
    return found


def _row_tokens(asked: int | None, shape: ModelShape) -> int:
    """Tokens a row: as asked, else as many as the model has positions, at most 1024."""
    most = shape.max_positions
    if asked is not None and most is not None and asked > most:
        raise UserError(f"evaluation.row_tokens={asked} is more than the model's {most} positions; give fewer.")
    return asked or min(most or 1024, 1024)
