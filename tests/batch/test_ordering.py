"""Waves hold every request once, in the order asked for."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.batch.ordering import ORDERINGS, checked, ordered, padding_share, predicted_tokens, waves
from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL, Request
from ds_llmpq.errors import UserError
from ds_llmpq.lengths.dataset import split
from ds_llmpq.lengths.predictor import train
from ds_llmpq.lengths.records import Example
from ds_llmpq.lengths.synthetic import answers
from ds_llmpq.schema import BatchConfig
from ds_llmpq.schema_lengths import LengthDataConfig, LengthTaskConfig, ProxyConfig


def prepared(lengths):
    return [PreparedRequest(place, array("i", [0] * length), 1) for place, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 7), st.sampled_from(ORDERINGS))
def test_every_request_runs_once_in_full_waves(lengths, sequences, ordering):
    rows = prepared(lengths)
    batches = waves(rows, sequences, ordering)
    flat = [each.request for batch in batches for each in batch]
    assert sorted(flat) == list(range(len(rows)))
    assert all(len(batch) == sequences for batch in batches[:-1])
    assert all(batches)
    if ordering == "arrival":
        assert flat == list(range(len(rows)))
    elif ordering == "prompt_length":
        assert flat == sorted(flat, key=lambda place: (-lengths[place], place))


def test_grouping_by_length_saves_padding():
    rows = prepared([1, 8] * 8)
    assert padding_share(waves(rows, 4)) == pytest.approx(1 - 72 / 128)
    assert padding_share(waves(rows, 4, "prompt_length")) == 0
    assert padding_share([]) == 0


def test_bad_arguments():
    with pytest.raises(UserError, match="arrival, prompt_length"):
        waves([], 1, "random")
    with pytest.raises(UserError, match="at least 1"):
        waves([], 0)


def test_the_longest_answers_go_first_within_prompts_of_like_length_if_bucketed():
    rows = prepared([3, 100, 2, 120, 70])
    expected = [50.0, 10.0, 60.0, 20.0, 15.0]
    assert [each.request for each in ordered(rows, "predicted_length", expected)] == [2, 0, 3, 4, 1]
    assert [each.request for each in ordered(rows, "bucketed", expected)] == [3, 4, 1, 2, 0]


def test_without_a_predictor_a_requests_own_limit_stands_for_its_length():
    rows = [PreparedRequest(place, array("i", [0]), limit) for place, limit in enumerate([5, 30, 5, 9])]
    assert [each.request for each in ordered(rows, "predicted_length")] == [1, 3, 0, 2]
    assert predicted_tokens(rows, None) == [5.0, 30.0, 5.0, 9.0]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    config = LengthDataConfig()
    rows = [Example(a.text, a.output_tokens, a.model, 9, str(n)) for n, a in enumerate(answers(300))]
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
    essay, yes, ids = predicted_tokens(rows, str(predictor), "plain-13b")
    assert yes < 20 < essay <= 500
    assert 1 <= ids <= 500
    short = [PreparedRequest(each.request, each.prompt_ids, 2) for each in rows]
    assert max(predicted_tokens(short, str(predictor))) == 2.0


def test_order_and_predictor_are_checked_before_anything_starts(predictor, tmp_path):
    assert checked(BatchConfig(order="bucketed", predictor=str(predictor))).predictor == str(predictor)
    for batch, said in (
        (BatchConfig(order="random"), "batch.order is 'random'"),
        (BatchConfig(predictor=str(predictor)), "of no use"),
        (BatchConfig(order="bucketed", predictor=str(tmp_path)), "holds no predictor"),
    ):
        with pytest.raises(UserError, match=said):
            checked(batch)
