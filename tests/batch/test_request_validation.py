"""Every field of a row is checked, and the message names value, bound and remedy."""

import pytest
from batch_helpers import chat_row, completion_row

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.request import COMPLETIONS_URL, RequestError, derive_seed
from ds_llmpq.batch.request_validation import check_defaults, parse_row, read_custom_id
from ds_llmpq.errors import UserError

DEFAULTS = BatchConfig()


def parse(row, defaults=DEFAULTS):
    return parse_row(row, 0, 1, defaults)


def refusal(row) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(row)
    assert caught.value.message.endswith(".")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    return caught.value


def test_defaults_fill_what_a_row_leaves_out():
    defaults = BatchConfig(max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=11, ignore_eos=True)
    params = parse(chat_row("x"), defaults).params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 3)
    assert params.ignore_eos
    assert params.stop == ()
    assert params.seed == derive_seed(11, "x")


def test_a_row_overrides_every_default():
    row = completion_row(
        max_tokens=3, temperature=1, top_p=0.25, top_k=5, seed=-4, stop="\n\n", ignore_eos=True, n=1, stream=False
    )
    params = parse(row).params
    assert params.max_tokens == 3
    assert params.temperature == 1.0
    assert isinstance(params.temperature, float)
    assert (params.top_p, params.top_k, params.seed, params.stop) == (0.25, 5, -4, ("\n\n",))
    assert params.ignore_eos


def test_null_is_the_same_as_absent():
    fields = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "n", "stream", "logprobs")
    nulls = dict.fromkeys((*fields, "user", "metadata", "max_completion_tokens"))
    assert parse(chat_row(**nulls)).params == parse(chat_row()).params


def test_max_completion_tokens_is_max_tokens():
    assert parse(chat_row(max_completion_tokens=9)).params.max_tokens == 9
    assert "keep one" in refusal(chat_row(max_completion_tokens=9, max_tokens=9)).message
    assert refusal(completion_row(max_completion_tokens=9)).code == "unknown_parameter"


def test_chat_content_may_be_text_parts():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert parse(chat_row(content=parts)).prompt == (("user", "one two"),)
    assert refusal(chat_row(content=[{"type": "image_url", "image_url": "x"}])).code == "unsupported_value"
    assert "messages[0].content[0]" in refusal(chat_row(content=[{"type": "text", "text": "a", "x": 1}])).message
    assert refusal(chat_row(content=[])).code == "invalid_type"


def test_prompt_may_be_text_or_token_ids():
    assert parse(completion_row(prompt="abc")).prompt == "abc"
    assert parse(completion_row(prompt=[5, 6])).prompt == (5, 6)
    assert refusal(completion_row(prompt=["a", "b"])).code == "unsupported_value"
    assert refusal(completion_row(prompt=[1, True])).code == "unsupported_value"
    assert refusal(completion_row(prompt=[[1, 2]])).code == "unsupported_value"
    assert "-1" in refusal(completion_row(prompt=[1, -1])).message
    assert refusal(completion_row(prompt="")).code == "empty_prompt"
    assert refusal(completion_row(prompt=[])).code == "empty_prompt"


@pytest.mark.parametrize(
    ("field", "value", "code", "says"),
    [
        ("max_tokens", 0, "invalid_value", "at least 1"),
        ("max_tokens", 1.0, "invalid_type", "whole number"),
        ("max_tokens", True, "invalid_type", "true"),
        ("max_tokens", "5", "invalid_type", "'5'"),
        ("max_tokens", 10**400, "invalid_value", "at least 1"),
        ("temperature", 2.1, "invalid_value", "2.1"),
        ("temperature", -0.1, "invalid_value", "from 0"),
        ("temperature", float("inf"), "invalid_value", "from 0"),
        ("temperature", float("nan"), "invalid_value", "from 0"),
        ("temperature", 10**400, "invalid_value", "from 0"),
        ("temperature", False, "invalid_type", "a number"),
        ("top_p", 0, "invalid_value", "above 0"),
        ("top_p", 1.01, "invalid_value", "at most 1"),
        ("top_k", -1, "invalid_value", "0 (off)"),
        ("seed", 2**63, "invalid_value", "2**63"),
        ("seed", 1.5, "invalid_type", "whole number"),
        ("stop", ["a"] * 5, "invalid_value", "at most 4"),
        ("stop", "", "invalid_value", "1 to 1024"),
        ("stop", ["a", ""], "invalid_value", "1 to 1024"),
        ("stop", "x" * 1025, "invalid_value", "1 to 1024"),
        ("stop", 3, "invalid_type", "list of strings"),
        ("stop", [3], "invalid_type", "list of strings"),
        ("ignore_eos", 1, "invalid_type", "true or false"),
        ("n", 2, "unsupported_value", "only 1"),
        ("n", True, "unsupported_value", "only 1"),
        ("n", 1.0, "unsupported_value", "only 1"),
        ("stream", True, "unsupported_value", "only false"),
        ("stream", 0, "unsupported_value", "only false"),
        ("logprobs", True, "unsupported_value", "only false"),
        ("logprobs", 0, "unsupported_value", "only false"),
        ("model", 3, "invalid_type", "a string"),
        ("user", [], "invalid_type", "a string"),
        ("tols", [], "unknown_parameter", "did you mean tools?"),
        ("xyzzy", None, "unknown_parameter", "'xyzzy'"),
    ],
)
@pytest.mark.parametrize("make", [chat_row, completion_row])
def test_bad_values_are_refused_by_name(make, field, value, code, says):
    error = refusal(make(**{field: value}))
    assert error.code == code
    assert field in error.message
    assert says in error.message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "GET"}, "invalid_method"),
        ({"method": None}, "invalid_type"),
        ({"url": "/v1/embeddings"}, "invalid_url"),
        ({"url": 3}, "invalid_type"),
        ({"body": []}, "invalid_type"),
        ({"priority": 1}, "unknown_parameter"),
    ],
)
def test_bad_rows_are_refused(change, code):
    assert refusal(chat_row() | change).code == code


@pytest.mark.parametrize("field", ["method", "url", "body"])
def test_missing_row_fields_are_named(field):
    row = chat_row()
    del row[field]
    error = refusal(row)
    assert error.code == "missing_required_parameter"
    assert field in error.message


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "empty_prompt"),
        ("hi", "invalid_type"),
        (["hi"], "invalid_type"),
        ([{"content": "hi"}], "invalid_value"),
        ([{"role": "tool", "content": "hi"}], "invalid_value"),
        ([{"role": ["user"], "content": "hi"}], "invalid_value"),
        ([{"role": "user", "content": None}], "invalid_type"),
        ([{"role": "user"}], "invalid_type"),
        ([{"role": "user", "content": "hi", "name": "x"}], "unknown_parameter"),
    ],
)
def test_bad_messages_are_refused(messages, code):
    assert refusal(chat_row(messages=messages)).code == code


def test_the_other_interface_s_prompt_field_is_unknown():
    assert refusal(chat_row(prompt="x")).code == "unknown_parameter"
    assert refusal(completion_row(messages=[])).code == "unknown_parameter"
    assert refusal(completion_row(metadata={})).code == "unknown_parameter"


@pytest.mark.parametrize(
    "row", [None, 3, "x", [], {}, {"custom_id": None}, {"custom_id": True}, {"custom_id": 3.0}, {"custom_id": ""}]
)
def test_unusable_custom_ids(row):
    with pytest.raises(RequestError):
        read_custom_id(row)


@pytest.mark.parametrize("number", [0, 7, -3, 10**30])
def test_a_whole_number_is_a_custom_id_as_its_string(number):
    assert parse(chat_row(number)).custom_id == str(number)
    assert parse(chat_row(number)).params == parse(chat_row(str(number))).params, "the derived seed, too"


# what clients write into every row: each is honoured by doing nothing
NEUTRAL = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "length_penalty": (1, 1.0),
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "store": (True, False),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "service_tier": ("auto", "default"),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "chat_template_kwargs": ({},),
    "guided_json": (),
}
# and what would change an answer: (value, what the refusal names beside the parameter)
CHANGING = [
    ("presence_penalty", False, "a number from -2 to 2"),
    ("length_penalty", 2, "only 1"),
    ("best_of", 3, "only 1"),
    ("best_of", True, "only 1"),
    ("echo", True, "only false"),
    ("echo", 0, "only false"),
    ("logit_bias", {"50256": -100}, '{"50256": -100} but only {}'),
    ("tools", [{"type": "function"}], "only []"),
    ("tool_choice", "required", 'only "none" or "auto"'),
    ("response_format", {"type": "json_object"}, '{"type": "json_object"} but only {"type": "text"}'),
    ("response_format", {"type": "text", "strict": True}, 'only {"type": "text"}'),
    ("stream_options", {"include_usage": True}, "only null"),
    ("top_logprobs", 5, "only 0"),
    ("modalities", ["text", "audio"], 'only ["text"]'),
    ("store", 1, "true or false"),
    ("reasoning_effort", "high", "only null"),
    ("guided_json", {"type": "object"}, "only null"),
    ("stop_token_ids", [2], "only []"),
]


@pytest.mark.parametrize("make", [chat_row, completion_row])
@pytest.mark.parametrize("field", NEUTRAL)
def test_neutral_values_are_served(make, field):
    plain = parse(make())
    for value in (None, *NEUTRAL[field]):
        assert parse(make(**{field: value})) == plain


@pytest.mark.parametrize("make", [chat_row, completion_row])
@pytest.mark.parametrize(("field", "value", "says"), CHANGING)
def test_values_that_would_change_the_answer_are_refused(make, field, value, says):
    error = refusal(make(**{field: value}))
    assert error.code in ("unsupported_value", "invalid_type")
    assert field in error.message
    assert says in error.message


def test_an_answer_dumped_by_a_client_library_is_a_message():
    answer = {"role": "assistant", "content": "Four."}
    dumped = answer | dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "annotations", "name"))
    said = [{"role": "user", "content": "2 + 2?"}, dumped, {"role": "user", "content": "Sure?"}]
    plain = [said[0], answer, said[2]]
    assert parse(chat_row(messages=said)).prompt == parse(chat_row(messages=plain)).prompt
    assert parse(chat_row(messages=[said[0], answer | {"tool_calls": [], "annotations": []}, said[2]]))
    for field, value in (("tool_calls", [{"id": "1"}]), ("refusal", "No."), ("audio", {"id": "1"})):
        error = refusal(chat_row(messages=[said[0], answer | {field: value}, said[2]]))
        assert f"messages[1] has '{field}'" in error.message


def test_long_values_are_cut_short_in_messages():
    assert len(refusal(chat_row() | {"url": "x" * 10**6}).message) < 200
    assert len(refusal(chat_row(**{"y" * 10**6: 1})).message) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 3.0), ("max_tokens", 0), ("top_p", 0.0), ("seed", 2**64), ("max_row_bytes", 0), ("limit", 0)],
)
def test_bad_defaults_are_a_user_error_naming_the_key(field, value):
    with pytest.raises(UserError, match=rf"batch\.{field} is"):
        check_defaults(BatchConfig(**{field: value}))


def test_derived_seeds_are_fixed_by_batch_seed_and_custom_id():
    assert derive_seed(0, "row-1") == 5819962331590022567  # results of earlier runs depend on it
    seeds = {derive_seed(batch, f"row-{i}") for batch in range(3) for i in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("arrival", [0, 2.5, 1e6])
def test_a_replayed_row_says_when_it_comes(arrival):
    row = {"custom_id": "a", "method": "POST", "url": COMPLETIONS_URL, "body": {"model": "m", "prompt": "x"}}
    assert parse_row(row, 0, 1, BatchConfig()).arrival_seconds == 0.0
    assert parse_row(row | {"arrival_seconds": arrival}, 0, 1, BatchConfig()).arrival_seconds == arrival


@pytest.mark.parametrize("arrival", [-1, "1", True, None, 1e12])
def test_an_arrival_that_is_no_time(arrival):
    row = {"custom_id": "a", "method": "POST", "url": COMPLETIONS_URL, "body": {"model": "m", "prompt": "x"}}
    with pytest.raises(RequestError, match=r"arrival_seconds is .* but must be a number from 0"):
        parse_row(row | {"arrival_seconds": arrival}, 0, 1, BatchConfig())


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("repetition_penalty", 1.1, 1.1), ("repetition_penalty", 1, 1.0), ("presence_penalty", -2, -2.0),
        ("frequency_penalty", 0.5, 0.5), ("min_p", 0, 0.0), ("min_p", 0.1, 0.1), ("min_tokens", 3, 3),
    ],
)  # fmt: skip
def test_penalties_and_bounds_are_taken(field, value, kept):
    params = parse_row(completion_row(max_tokens=8, **{field: value}), 0, 1, BatchConfig()).params
    assert getattr(params, field) == kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0), ("repetition_penalty", "1"), ("presence_penalty", 2.1), ("frequency_penalty", True),
        ("min_p", 1.5), ("min_tokens", -1), ("min_tokens", 2.0), ("min_tokens", 9),
    ],
)  # fmt: skip
def test_penalties_out_of_bounds_are_refused(field, value):
    with pytest.raises(RequestError, match=field):
        parse_row(completion_row(max_tokens=8, **{field: value}), 0, 1, BatchConfig())


def test_what_a_row_leaves_out_is_the_checkpoint_s():
    params = parse_row(completion_row(), 0, 1, BatchConfig()).params
    assert (params.min_p, params.repetition_penalty, params.min_tokens) == (None, None, None)
    assert (params.presence_penalty, params.frequency_penalty) == (0, 0)
