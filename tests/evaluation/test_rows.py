"""Rows to score: what travels, how a text is cut, and the sums over scores."""

import math
import random

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.job import ScoreJob
from ds_llmpq.evaluation.rank import scored_rows, spread, summary
from ds_llmpq.evaluation.rows import RowBatch, RowScore, ScoredRow
from ds_llmpq.models.corpus import CALIBRATION, EVALUATION, Text, calibration_rows, cut_rows, read_text
from ds_llmpq.serving.job import to_token


def test_a_row_predicts_its_last_tokens():
    row = ScoredRow.of([5, 6, 7, 8], scored=2)
    assert (row.prompt, row.targets) == ((5, 6, 7), (7, 8))
    assert ScoredRow.of([5, 6, 7]).targets == (6, 7)


def test_batches_travel_unchanged():
    generator = random.Random(1)
    for _ in range(20):
        rows = []
        for _ in range(generator.randrange(1, 6)):
            tokens = [generator.randrange(1 << 20) for _ in range(generator.randrange(2, 9))]
            rows.append(ScoredRow.of(tokens, generator.randrange(1, len(tokens)), generator.choice([None, 0, 77])))
        batch = RowBatch(tuple(rows))
        assert RowBatch.from_bytes(batch.to_bytes()) == batch


def test_every_token_but_the_first_is_scored_once():
    generator = random.Random(2)
    for _ in range(50):
        tokens = [generator.randrange(99) for _ in range(generator.randrange(2, 40))]
        length = generator.randrange(1, 12)
        rows = cut_rows(tokens, length)
        scored, compared = scored_rows(rows, 10_000)
        assert [target for row in scored for target in row.targets] == tokens[1:]
        assert max(len(row.prompt) for row in scored) <= length
        assert compared == len(tokens) - 1
        assert [row.offset for row in scored] == [sum(len(r.targets) for r in scored[:i]) for i in range(len(scored))]


def test_only_so_many_tokens_are_compared():
    scored, compared = scored_rows(cut_rows(list(range(12)), 4), 9)
    assert [row.offset for row in scored] == [0, 4, None]
    assert compared == 8
    assert scored_rows(cut_rows(list(range(12)), 4), 0)[1] == 0


def test_a_limit_takes_rows_from_all_of_the_text():
    rows = cut_rows(list(range(101)), 10)
    assert spread(rows, None) == rows
    assert [row[0] for row in spread(rows, 39)] == [0, 30, 60]
    assert [row[0] for row in spread(rows, 1)] == [0]
    assert spread(rows, 10_000) == rows


def test_summary():
    scores = [RowScore([-1.0, -2.0], [True, False], 0.5, 2), RowScore([-3.0], [True])]
    found = summary(scores, words=2)
    assert found["nats_per_token"] == pytest.approx(2.0)
    assert found["perplexity_per_token"] == pytest.approx(math.exp(2))
    assert found["perplexity_per_word"] == pytest.approx(math.exp(3))
    assert (found["top1_accuracy"], found["compared_tokens"]) == (pytest.approx(2 / 3), 2)
    assert (found["kl_nats_per_token"], found["top1_agreement"]) == (0.25, 1.0)
    assert "kl_nats_per_token" not in summary(scores[1:], 1)


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
    rows = calibration_rows(text, Letters(), rows=3, length=10)
    assert rows.shape == (3, 11)
    assert rows[:, 0].tolist() == [100, 130, 160]
    with pytest.raises(UserError, match="has 101 tokens, too short for 11 rows of 10"):
        calibration_rows(text, Letters(), rows=11, length=10)
    with pytest.raises(UserError, match="two are the least"):
        cut_rows([1], 4)


@pytest.mark.parametrize("token", ["no", "eJw=", to_token([1]), to_token({"a": 10**400}), "é"])
def test_a_broken_token(token):
    with pytest.raises(UserError, match=r"The job token (cannot be read|holds).*start it through"):
        ScoreJob.from_token(token)
