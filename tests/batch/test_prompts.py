"""Prompts as token ids: the tokenizer's own calls one by one are the reference."""

from array import array

import pytest
from batch_helpers import byte_level, chat_row, completion_row, write_rows

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.prompts import (
    CHUNK_REQUESTS,
    encode_all,
    limit_max_tokens,
    prepare,
    render_chat,
)
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import CHAT_URL, Request, RequestError


def encode(request, tokenizer):
    [(_, ids)] = encode_all([request], tokenizer)
    return ids


@pytest.fixture
def requests_of(tmp_path):
    return lambda rows: read_requests(write_rows(tmp_path / "in.jsonl", rows), BatchConfig()).requests


def expected_ids(request, tokenizer):
    if not request.is_chat:
        return tokenizer(request.prompt)["input_ids"] if isinstance(request.prompt, str) else list(request.prompt)
    messages = [{"role": role, "content": content} for role, content in request.prompt]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def test_batched_encoding_is_the_tokenizers_own(requests_of):
    rows = []
    for i in range(2 * CHUNK_REQUESTS + 7):
        text = "你好 def f(x):\n" * (1 + i % 5) + str(i)
        rows.append(
            [chat_row(str(i), text), completion_row(str(i), text), completion_row(str(i), [i % 300, 5, 5])][i % 3]
        )
    requests, tokenizer, done = requests_of(rows), byte_level(), []
    prepared, errors = prepare(requests, tokenizer, context_tokens=1000, progress=done.append)
    assert errors == []
    assert [each.request for each in prepared] == requests
    assert all(list(each.prompt_ids) == expected_ids(each.request, tokenizer) for each in prepared)
    assert all(isinstance(each.prompt_ids, array) for each in prepared)
    assert done == [CHUNK_REQUESTS, CHUNK_REQUESTS, 7]
    assert encode(requests[0], tokenizer) == list(prepared[0].prompt_ids)


def test_completions_get_the_tokenizers_special_tokens_and_chat_only_the_templates(requests_of):
    tokenizer = byte_level()
    chat, completion = requests_of([chat_row("a"), completion_row("b")])
    assert encode(completion, tokenizer)[0] == tokenizer.bos_token_id
    assert encode(chat, tokenizer).count(tokenizer.bos_token_id) == 1
    assert render_chat(chat, tokenizer) == "<s><|user|>hello</s><|assistant|>"


def test_no_chat_template_and_a_refusing_one(requests_of):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    requests = requests_of([chat_row("a", messages=messages), completion_row("b"), chat_row("c")])
    prepared, errors = prepare(requests, byte_level(), context_tokens=100)
    assert [each.request.custom_id for each in prepared] == ["b", "c"]
    assert [(e.line, e.custom_id, e.code) for e in errors] == [(1, "a", "template_error")]
    assert "system comes first" in errors[0].message
    prepared, errors = prepare(requests, byte_level(None), context_tokens=100)
    assert [each.request.custom_id for each in prepared] == ["b"]
    assert ["no chat template" in error.message for error in errors] == [True, True]


def test_a_template_that_is_broken_jinja_is_an_error_row(requests_of):
    [error] = prepare(requests_of([chat_row()]), byte_level("{% for m in %}"), context_tokens=100)[1]
    assert error.code == "template_error"


def test_no_tokens_at_all(requests_of):
    [request] = requests_of([chat_row(content="")])
    [(_, refusal)] = encode_all([request], byte_level("{{ '' }}"))
    assert isinstance(refusal, RequestError)
    assert refusal.code == "empty_prompt"


def test_token_ids_outside_the_vocabulary(requests_of):
    tokenizer = byte_level()
    rows = [completion_row("a", [1, len(tokenizer)]), completion_row("b", [len(tokenizer) - 1, 10**30])]
    requests = requests_of([*rows, completion_row("c", [len(tokenizer) - 1])])
    prepared, errors = prepare(requests, tokenizer, context_tokens=100)
    assert [each.request.custom_id for each in prepared] == ["c"]
    assert [error.code for error in errors] == ["invalid_value"] * 2
    assert f"end at {len(tokenizer) - 1}" in errors[0].message
    assert prepare(requests, tokenizer, context_tokens=100, vocabulary_size=5)[0] == []


def test_one_text_the_tokenizer_refuses_spares_its_neighbours(requests_of):
    tokenizer = byte_level()

    class Picky:
        chat_template = None

        def __len__(self):
            return len(tokenizer)

        def __call__(self, texts, **options):
            if any("bad" in text for text in texts):
                raise TypeError("not this one")
            return tokenizer(texts, **options)

    rows = [completion_row("a", "good"), completion_row("b", "bad"), completion_row("c", "fine")]
    prepared, errors = prepare(requests_of(rows), Picky(), context_tokens=100)
    assert [each.request.custom_id for each in prepared] == ["a", "c"]
    assert [(e.custom_id, e.code) for e in errors] == [("b", "tokenization_error")]


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "capacity", "expected"),
    [
        (10, 5, 100, None, 5),
        (95, 5, 100, None, 5),
        (96, 5, 100, None, 4),
        (99, 5, 100, 100, 1),
        (100, 5, 100, None, "context_length_exceeded"),
        (101, 1, 100, 50, "context_length_exceeded"),
        (10, 5, 100, 15, 5),
        (10, 6, 100, 15, "capacity_exceeded"),
        (99, 50, 100, 99, "capacity_exceeded"),
    ],
)
def test_length_limits(requests_of, prompt, asked, context, capacity, expected):
    [request] = requests_of([completion_row(max_tokens=asked)])
    if isinstance(expected, int):
        assert limit_max_tokens(request, prompt, context, capacity) == expected
        return
    with pytest.raises(RequestError) as caught:
        limit_max_tokens(request, prompt, context, capacity)
    assert caught.value.code == expected
    assert str(prompt) in caught.value.message


def test_a_template_that_lacks_a_token_says_which():
    """Every row fails then: other roles would not help."""

    class Tokenizer:
        chat_template = "{{ messages[0]['content'] + eos_token }}"
        eos_token = None

        def apply_chat_template(self, *_, **__):
            raise TypeError('can only concatenate str (not "NoneType") to str')

    request = Request(0, 1, "a", CHAT_URL, None, (("user", "x"),), None)
    with pytest.raises(RequestError, match=r"set eos_token in tokenizer_config\.json"):
        render_chat(request, Tokenizer())
    Tokenizer.eos_token = "</s>"
    with pytest.raises(RequestError, match="change their roles"):
        render_chat(request, Tokenizer())
