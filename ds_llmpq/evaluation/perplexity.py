"""Perplexity of a text, and divergence from the reference model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.config import EvaluationConfig
from ds_llmpq.evaluation.scoring import RowScore, ScoringRounds, build_row
from ds_llmpq.models.corpus import EVALUATION, cut_rows, encode, read_text
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.models.tokenizer import load_tokenizer


class TextRows:
    """A text cut into rows. `UserError`: settings that the model or the text does not allow."""

    def __init__(self, settings: EvaluationConfig, model_path: str, trust_remote_code: bool):
        shape, tokenizer = read_shape(model_path), load_tokenizer(model_path, trust_remote_code)
        self.text = read_text(settings.text, EVALUATION)
        rows = cut_rows(encode(self.text, tokenizer), _row_tokens(settings.row_tokens, shape))
        kept = thin_rows(rows, settings.limit_tokens)
        self.words = self.text.words
        if len(kept) < len(rows):
            self.words = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).split()) for row in kept)
        self.rows = [build_row(key, tokens) for key, tokens in enumerate(kept)]

    def score(self, rounds: ScoringRounds, show: Callable[[str, int, int], None]) -> dict[str, Any]:
        scores = rounds.score(self.rows, show)
        return summarize_scores(scores, self.words) | {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "logprobs": [round(value, 6) for score in scores for value in score.logprobs],
        }


def thin_rows(rows: list[list[int]], limit_tokens: int | None) -> list[list[int]]:
    """Whole rows (at least one), spread evenly over the text, with at most `limit_tokens` scored tokens."""
    if limit_tokens is None:
        return rows
    count = min(len(rows), max(1, limit_tokens // max(len(row) - 1 for row in rows)))
    return [rows[index * len(rows) // count] for index in range(count)]


def summarize_scores(scores: list[RowScore], words: int) -> dict[str, Any]:
    """Loss in nats, perplexity per token and per word. With a reference also KL per token and top-1 agreement."""
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
    """Tokens per row: as requested, else the model's positions, at most 1024."""
    most = shape.max_positions
    if asked is not None and most is not None and asked > most:
        raise UserError(f"evaluation.row_tokens={asked} is more than the model's {most} positions; give fewer.")
    return asked or min(most or 1024, 1024)
