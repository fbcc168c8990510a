"""Every request runs once, in the order asked for, with what a predictor believes of it."""

import json
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL, Request
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError
from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.lengths.dataset import split
from ds_llmpq.lengths.predictor import train
from ds_llmpq.lengths.records import Example
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.serving.job import ORDERINGS, Job, validate_batch
from ds_llmpq.serving.ordering import JobRequests, order_requests, predict_answers
from scripts.make_length_data import make_answers

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from pipeline_cases import make_plan

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"


def prepared(lengths):
    return [PreparedRequest(place, array("i", [0] * length), 1) for place, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 9), max_size=20), st.sampled_from(ORDERINGS))
def test_every_request_runs_once(lengths, ordering):
    order = order_requests(prepared(lengths), ordering)
    assert sorted(order) == list(range(len(lengths)))
    if ordering == "arrival":
        assert order == list(range(len(lengths)))
    elif ordering == "prompt_length":
        assert order == sorted(order, key=lambda place: (-lengths[place], place))


def test_an_order_that_is_not_known():
    with pytest.raises(UserError, match="arrival, prompt_length"):
        order_requests([], "random")


def test_the_longest_answers_go_first_within_prompts_of_like_length_if_bucketed():
    rows = prepared([3, 100, 2, 120, 70])
    tokens = [50.0, 10.0, 60.0, 20.0, 15.0]
    assert order_requests(rows, "predicted_length", tokens) == [2, 0, 3, 4, 1]
    assert order_requests(rows, "bucketed", tokens) == [3, 4, 1, 2, 0]


def test_without_a_predictor_a_requests_own_limit_stands_for_its_length():
    rows = [PreparedRequest(place, array("i", [0]), limit) for place, limit in enumerate([5, 30, 5, 9])]
    assert order_requests(rows, "predicted_length") == [1, 3, 0, 2]
    answers = predict_answers(rows, BatchConfig())
    assert (answers.tokens, answers.bounds) == ([5.0, 30.0, 5.0, 9.0], [5, 30, 5, 9])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    config = LengthDataConfig()
    rows = [Example(a.text, a.output_tokens, a.model, 9, str(n)) for n, a in enumerate(make_answers(300))]
    folder = tmp_path_factory.mktemp("predictor")
    train(split(rows, config), LengthTaskConfig(), ProxyConfig(features=2048), config).save(folder)
    return folder


def test_a_predictor_reads_prompts_of_every_kind_and_keeps_to_limits(predictor):
    prompts = ["Write an essay about rain.", (("user", "Answer with yes or no: is rain a good idea?"),), (5, 6, 7)]
    urls = [COMPLETIONS_URL, CHAT_URL, COMPLETIONS_URL]
    rows = [
        PreparedRequest(Request(n, n, str(n), urls[n], None, prompt, None), array("i", [0] * 9), 500)
        for n, prompt in enumerate(prompts)
    ]
    batch = BatchConfig(predictor=str(predictor), admission="q90")
    answers = predict_answers(rows, batch, "plain-13b")
    essay, yes, ids = answers.tokens
    assert yes < 20 < essay <= 500
    assert 1 <= ids <= 500
    assert all(tokens <= bound <= 500 for tokens, bound in zip(answers.tokens, answers.bounds, strict=True))
    wider = predict_answers(rows, replace(batch, admission="q95"), "plain-13b").bounds
    assert sum(wider) > sum(answers.bounds)
    assert predict_answers(rows, replace(batch, admission="worst_case")).bounds == [500] * 3
    short = [PreparedRequest(each.request, each.prompt_ids, 2) for each in rows]
    assert max(predict_answers(short, batch).tokens) == max(predict_answers(short, batch).bounds) == 2
    # a trace's limits are the lengths its answers had
    replayed = predict_answers(short, replace(batch, replay="trace"), "plain-13b")
    assert (replayed.tokens, max(replayed.bounds)) == (answers.tokens, 2)


def test_order_and_predictor_are_checked_before_anything_starts(predictor, tmp_path):
    assert (
        validate_batch(BatchConfig()).order
        == validate_batch(BatchConfig(predictor=str(predictor))).order
        == "predicted_length"
    )
    assert (
        validate_batch(BatchConfig(order="arrival")).order
        == validate_batch(BatchConfig(replay="trace")).order
        == "arrival"
    )
    assert validate_batch(BatchConfig(order="bucketed", predictor=str(predictor))).predictor == str(predictor)
    for batch in (
        BatchConfig(admission="q95", predictor=str(predictor)),
        BatchConfig(replay="trace", policy="ssjf", predictor=str(predictor)),
        BatchConfig(replay="trace", policy="sjf"),
    ):
        assert validate_batch(batch).predictor == batch.predictor
    for batch, said in (
        (BatchConfig(admission="q99"), "batch.admission is 'q99'"),
        (BatchConfig(admission="q95"), "batch.admission=q95 needs batch.predictor"),
        (BatchConfig(policy="random"), "batch.policy is 'random'"),
        (BatchConfig(replay="live"), "batch.replay is 'live'"),
        (BatchConfig(replay="trace", policy="ssjf"), "batch.policy=ssjf needs batch.predictor"),
        (BatchConfig(replay="trace", order="bucketed"), "give batch.policy"),
        (BatchConfig(replay="trace", admission="q95", predictor=str(predictor)), "reserves each answer's own limit"),
        (BatchConfig(order="random"), "batch.order is 'random'"),
        (BatchConfig(order="arrival", predictor=str(predictor)), "of no use"),
        (BatchConfig(order="bucketed", predictor=str(tmp_path)), r"predictor\.json cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            validate_batch(batch)


PREFIX, OWN, ANSWER = range(100, 140), 4, 4


@pytest.mark.parametrize(
    ("workload", "others", "share", "shapes"),
    [
        ((4, 44, 4, 40), 0, True, [(4, 8)]),
        ((4, 44, 4), 0, True, [(4, 38)]),  # the plan has no room of its own for the prefix
        ((8, 44, 4, 40), 1, True, [(1, 64), (8, 8)]),
        ((4, 44, 4, 40, 48), 1, True, [(4, 48)]),
        ((8, 44, 4), 1, True, [(7, 48)]),  # a slot is given up for it
        ((4, 44, 4), 1, False, [(4, 48)]),
        ((4, 44, 4, 40), 1, False, [(1, 48)]),
    ],
)
def test_slots_hold_what_follows_the_prefix(tmp_path, workload, others, share, shapes):
    """Requests without it find room as well."""
    prompts = [[*PREFIX, *range(200 + n, 200 + n + OWN)] for n in range(12)]
    prompts += [[*range(300, 300 + len(prompts[0]))]] * others
    plan, found = read_job(tmp_path, prompts, workload)
    assert found.prefix == (tuple(PREFIX) if share else ())
    groups = []
    while (group := found.admission.take()) is not None:
        groups.append(group.shape)
    assert list(dict.fromkeys(groups)) == shapes
    assert all(slots * capacity <= plan.cache_positions - len(found.prefix) for slots, capacity in groups)
    found.drop_prefix()  # a stage could not compute it
    group = found.admission.take()
    assert group.capacity >= len(prompts[0]) + ANSWER
    assert group.slots * group.capacity <= plan.cache_positions


@pytest.mark.parametrize("order", ["predicted_length", "arrival"])
def test_requests_with_the_prefix_are_neighbours(tmp_path, order):
    """Among as many as there are slots, and with what is known of each still at its place; not if asked for the file's
    order."""
    prompts = [[*(PREFIX if n % 2 else ()), *range(200 + n, 200 + n + OWN)] for n in range(16)]
    _, found = read_job(tmp_path, prompts, (4, 44, 4, 40), order)
    places = [each.request.index for each in found.prepared]
    windows = [places[start : start + 4] for start in range(0, 16, 4)]
    expected = [[n + 1, n + 3, n, n + 2] for n in range(0, 16, 4)]
    assert windows == (expected if order != "arrival" else [[*range(n, n + 4)] for n in range(0, 16, 4)])
    assert found._shared == [len(PREFIX) * (place % 2) for place in places]


def read_job(tmp_path, prompts, workload, order="predicted_length"):
    rows = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions",
         "body": {"prompt": prompt, "max_tokens": ANSWER}}
        for n, prompt in enumerate(prompts)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan, batch = make_plan(TINY, [(0, 2)], workload=workload), validate_batch(BatchConfig(order=order))
    job = Job(plan, str(TINY), str(file), str(tmp_path), EngineConfig(), batch)
    tokenizer = load_tokenizer(str(TINY), False)
    return plan, JobRequests(job, read_requests(str(file), BatchConfig()), {}, tokenizer, lambda *_: None)
