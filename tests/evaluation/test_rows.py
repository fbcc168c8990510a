"""Rows to score: what travels, how a text is cut, and the sums over scores."""

import math
import random

import pytest
import torch

from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.config import EvaluationConfig, ScoringTask
from ds_llmpq.evaluation.perplexity import summarize_scores, thin_rows
from ds_llmpq.evaluation.scoring import RowScore, TargetScorer, build_row
from ds_llmpq.models.corpus import CALIBRATION, EVALUATION, Text, cut_rows, read_text, select_calibration_rows
from ds_llmpq.serving.job import Job, pack_token


def test_a_row_predicts_its_last_tokens():
    row = build_row(3, [5, 6, 7, 8], scored=2)
    assert (row.key, row.prompt, row.targets) == (3, (5, 6, 7), (7, 8))
    assert build_row(0, [5, 6, 7]).targets == (6, 7)


def test_every_token_but_the_first_is_scored_once():
    generator = random.Random(2)
    for _ in range(50):
        tokens = [generator.randrange(99) for _ in range(generator.randrange(2, 40))]
        length = generator.randrange(1, 12)
        scored = [build_row(key, row) for key, row in enumerate(cut_rows(tokens, length))]
        assert [target for row in scored for target in row.targets] == tokens[1:]
        assert max(len(row.prompt) for row in scored) <= length


VOCABULARY = 11


def logits_of(rows, seed):
    longest = max(len(row.prompt) for row in rows)
    return torch.randn(len(rows), longest, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("full", "compared"), [(1 << 20, 3), (4 * VOCABULARY * 8, 2), (4 * VOCABULARY * 3, 0)])
def test_scores_and_divergence_are_the_formulas(tmp_path, full, compared):
    """Rows of four targets against a reference file that holds as many whole rows as fit."""
    rows = [build_row(key, [1, 2, 3, 4, key]) for key in range(3)]
    plain, other = logits_of(rows, 1), logits_of(rows, 2)
    for keeps, logits in ((True, plain), (False, other)):
        task = ScoringTask(EvaluationConfig(reference_bytes=full), str(tmp_path / "reference"), keeps)
        scorer = TargetScorer(task, is_last=True)
        # as micro-batches come: one row, then two
        assert scorer(rows[:1], logits[:1]) + scorer(rows[1:], logits[1:]) == [True] * 3
        scorer.close()
    for key, row in enumerate(rows):
        found, wanted = other[key].log_softmax(-1), plain[key].log_softmax(-1)
        score = scorer.scores[key]
        assert score.logprobs == pytest.approx([found[k, token].item() for k, token in enumerate(row.targets)])
        assert score.greedy == [found[k].argmax().item() == token for k, token in enumerate(row.targets)]
        if key < compared:
            assert score.kl == pytest.approx((wanted.exp() * (wanted - found)).sum().item(), rel=1e-4)
            assert score.agree == (found.argmax(-1) == wanted.argmax(-1)).sum().item()
        else:
            assert score.kl is None


def test_logits_that_are_no_numbers_score_nothing():
    rows = [build_row(key, [1, 2, 3]) for key in range(2)]
    logits = logits_of(rows, 3)
    logits[1, 1, 4] = torch.nan
    scorer = TargetScorer(ScoringTask(EvaluationConfig()), is_last=True)
    assert scorer(rows, logits) == [True, False]
    assert list(scorer.scores) == [0]


def test_a_limit_takes_rows_from_all_of_the_text():
    rows = cut_rows(list(range(101)), 10)
    assert thin_rows(rows, None) == rows
    assert [row[0] for row in thin_rows(rows, 39)] == [0, 30, 60]
    assert [row[0] for row in thin_rows(rows, 1)] == [0]
    assert thin_rows(rows, 10_000) == rows


def test_summary():
    scores = [RowScore([-1.0, -2.0], [True, False], 0.5, 2), RowScore([-3.0], [True])]
    found = summarize_scores(scores, words=2)
    assert found["nats_per_token"] == pytest.approx(2.0)
    assert found["perplexity_per_token"] == pytest.approx(math.exp(2))
    assert found["perplexity_per_word"] == pytest.approx(math.exp(3))
    assert (found["top1_accuracy"], found["compared_tokens"]) == (pytest.approx(2 / 3), 2)
    assert (found["kl_nats_per_token"], found["top1_agreement"]) == (0.25, 1.0)
    assert "kl_nats_per_token" not in summarize_scores(scores[1:], 1)


def test_default_texts_do_not_overlap():
    calibration, evaluation = read_text(None, CALIBRATION), read_text(None, EVALUATION)
    assert min(len(calibration.text), len(evaluation.text)) > 50_000
    lines = {line for line in calibration.text.splitlines() if len(line) > 60}
    shared = lines & set(evaluation.text.splitlines())
    assert len(shared) < len(lines) / 50
    assert calibration.sha256 == read_text(None, CALIBRATION).sha256 != evaluation.sha256


class Letters:
    def __call__(self, text, verbose):
        return {"input_ids": [ord(letter) for letter in text]}


def test_calibration_rows_spread_over_the_text():
    text = Text("x", "".join(chr(number) for number in range(100, 201)))
    rows = select_calibration_rows(text, Letters(), rows=3, length=10)
    assert rows.shape == (3, 11)
    assert rows[:, 0].tolist() == [100, 130, 160]
    with pytest.raises(UserError, match="has 101 tokens, too short for 11 rows of 10"):
        select_calibration_rows(text, Letters(), rows=11, length=10)
    with pytest.raises(UserError, match="two are the least"):
        cut_rows([1], 4)


@pytest.mark.parametrize("token", ["no", "eJw=", pack_token([1]), pack_token({"a": 10**400}), "é"])
def test_a_broken_token(token):
    with pytest.raises(UserError, match=r"The job token (cannot be read|holds).*start it through"):
        Job.from_token(token)
