"""What a plan is sized for: the longest answer allowed, or with a predictor what is reserved for most answers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.prompts import prepare
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.errors import UserError
from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.lengths.dataset import split
from ds_llmpq.lengths.predictor import train
from ds_llmpq.lengths.records import Example
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.scheduler.admission import AdmissionQueue
from ds_llmpq.serving.ordering import predict_answers
from ds_llmpq.serving.workload import size_workload
from scripts.make_length_data import make_answers

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
LIMIT = 400
SHORTER = 6  # answers are so many times shorter than drawn


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    config = LengthDataConfig()
    rows = [
        Example(a.text, max(1, a.output_tokens // SHORTER), a.model, 9, str(n))
        for n, a in enumerate(make_answers(600, 1))
    ]
    folder = tmp_path_factory.mktemp("predictor")
    train(split(rows, config), LengthTaskConfig(), ProxyConfig(features=2048), config).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Requests that all allow the same long answer."""
    rows = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": a.model, "prompt": a.text, "max_tokens": LIMIT},
        }
        for n, a in enumerate(make_answers(120))
    ]
    path = tmp_path_factory.mktemp("input") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sized(file, batch, refill=True, block=0, **given):
    model = ModelConfig(path=str(TINY))
    return size_workload(WorkloadConfig(**given), model, file, batch, read_shape(str(TINY)), refill, block=block)


def prepared_of(file):
    requests = read_requests(file, BatchConfig()).requests
    return prepare(requests, load_tokenizer(str(TINY), False), context_tokens=1024)[0]


def test_without_a_predictor_every_request_fits_a_slot(file):
    found = sized(file, BatchConfig())
    assert found == WorkloadConfig(32, max(each.prompt_tokens for each in prepared_of(file)), LIMIT, 0, drawn_share=0.0)


@pytest.mark.parametrize(("admission", "most_longer"), [("q95", 0.05), ("q90", 0.1)])
def test_with_a_predictor_all_but_the_admission_s_share_fit(file, predictor, admission, most_longer):
    batch = BatchConfig(predictor=predictor, admission=admission)
    found, rows = sized(file, batch), prepared_of(file)
    answers = predict_answers(rows, batch)
    assert found.generated_tokens < 0.7 * LIMIT
    feed = AdmissionQueue(
        rows, answers.bounds, found.sequences, found.prompt_tokens + found.generated_tokens, refill=True
    )
    longer = [each.prompt_tokens + bound > feed.row_positions for each, bound in zip(rows, answers.bounds, strict=True)]
    assert np.mean(longer) <= most_longer
    assert found.generated_tokens >= np.mean(answers.tokens)
    # and whatever is longer runs in the same memory
    for slots, capacity in {feed.choose_shape(each.prompt_tokens + LIMIT) for each in rows}:
        assert slots * capacity <= feed.positions


def test_worst_case_admission_reserves_the_limits(file, predictor):
    batch = BatchConfig(predictor=predictor, order="predicted_length")
    longest = max(each.sequence_tokens for each in prepared_of(file))
    found = sized(file, batch)
    assert found.prompt_tokens + found.generated_tokens == longest


def test_without_refill_a_wave_lasts_as_long_as_its_longest(file, predictor):
    batch = BatchConfig(predictor=predictor, admission="q90")
    by_sequences = [sized(file, batch, refill=False, sequences=count).generated_tokens for count in (1, 4, 16, 64)]
    assert by_sequences == sorted(by_sequences)
    assert by_sequences[-1] > sized(file, batch).generated_tokens > by_sequences[0]


def test_a_prefix_that_prompts_share_is_measured(tmp_path):
    """Where the engine shares one, and the prompts that the user gave are longer."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": [*range(100, 150), *range(200 + n, 210 + n)], "max_tokens": 9}}
        for n in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measured(share=True, field="shared_tokens", **given):
        model = ModelConfig(path=str(TINY))
        found = size_workload(
            WorkloadConfig(**given), model, str(path), BatchConfig(), read_shape(str(TINY)), True, share
        )
        return getattr(found, field)

    assert measured() == 50
    assert measured(field="unshared_tokens") == 0
    assert measured(share=False) == measured(prompt_tokens=50) == 0
    assert measured(shared_tokens=7) == 7
    rows[3]["body"]["prompt"] = [*range(300, 330)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (measured(), measured(field="unshared_tokens")) == (50, 39)


def test_the_share_of_drawn_rows_is_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": "one", "max_tokens": 9, "temperature": 0.5 if n < 3 else 0}}
        for n in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sized(path, BatchConfig()).drawn_share == 0.25
    assert sized(path, BatchConfig(), sequences=3, prompt_tokens=50, generated_tokens=60).drawn_share == 0.25
    assert sized(None, BatchConfig()).drawn_share == 0
    assert sized(path, BatchConfig(), drawn_share=0.5).drawn_share == 0.5


def test_a_pool_has_room_for_requests_of_the_mean_length(file, predictor):
    rows = prepared_of(file)
    needs = [-(-each.sequence_tokens // 32) * 32 for each in rows]
    found = sized(file, BatchConfig(), block=32, sequences=8)
    assert found.pool_positions % 32 == 0
    assert 0 <= found.pool_positions - 8 * np.mean(needs) < 32
    expecting = sized(file, BatchConfig(predictor=predictor, order="predicted_length"), block=32, sequences=8)
    assert expecting.pool_positions < 0.8 * found.pool_positions
    assert sized(file, BatchConfig(), block=32, sequences=1).pool_positions == max(needs), "the longest fits alone"
    assert sized(file, BatchConfig(), block=32, pool_positions=640).pool_positions == 640
    given = {"sequences": 3, "prompt_tokens": 50, "generated_tokens": 60}
    assert sized(file, BatchConfig(), block=32, **given).pool_positions == 3 * 128
    assert sized(None, BatchConfig(), block=32).pool_positions == 32 * 640


def test_given_numbers_stay(file, predictor):
    batch = BatchConfig(predictor=predictor, admission="q95")
    assert sized(file, batch, sequences=3, prompt_tokens=50, generated_tokens=60) == WorkloadConfig(
        3, 50, 60, drawn_share=0.0
    )
    assert sized(file, batch, sequences=3).sequences == 3


def test_a_predictor_that_would_not_be_used_is_named(file, predictor):
    with pytest.raises(UserError, match=r"batch\.predictor is of no use"):
        sized(file, BatchConfig(predictor=predictor, order="arrival"))
    with pytest.raises(UserError, match=r"predictor\.json cannot be read"):
        sized(file, replace(BatchConfig(), predictor=str(TINY), admission="q95"))
