"""Incremental text and stop strings against decoding everything at once after every token."""

import pytest
from batch_helpers import byte_level, metaspace
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llmpq.batch import detokenizer
from ds_llmpq.batch.detokenizer import MAX_WINDOW_TOKENS, GenerationState, TextState, decode

TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace}
TEXTS = ["hello world", "naïve café", "你好世界", "😀😀 👩‍👩‍👧", "  x\n\n", "def f(x):", "a", ".", " "]


def reference(tokenizer, token_ids, stops):
    """(tokens until a stop string shows, text), by decoding all tokens again after every token."""
    for count in range(1, len(token_ids) + 1):
        text = decode(tokenizer, token_ids[:count])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return count, text[: min(found)]
    return None, decode(tokenizer, token_ids)


def run(tokenizer, token_ids, stops):
    state = TextState(tokenizer, tuple(stops))
    for count, token_id in enumerate(token_ids, start=1):
        if state.push(token_id):
            return count, state.text
    return None, state.text


@st.composite
def streams(draw, kind):
    """Token ids: encoded text and single tokens of any kind, so characters are split and bytes are broken."""
    tokenizer = TOKENIZERS[kind]()
    encoded = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    single = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    return [token for part in draw(st.lists(encoded | single, max_size=60)) for token in part]


@st.composite
def stops_for(draw, tokenizer, token_ids):
    """Stop strings, most of them cut out of the stream's own text. None holds a replacement character."""
    whole = decode(tokenizer, token_ids)
    cut = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 12)).map(lambda at: whole[at[0] : sum(at)])
    stops = draw(st.lists(cut | st.sampled_from(["\n\n", "好世", "😀", "zz", " "]), max_size=4))
    return [stop for stop in stops if stop and "\ufffd" not in stop]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(TOKENIZERS)))
def test_same_as_decoding_all_at_once(data, kind):
    tokenizer = TOKENIZERS[kind]()
    token_ids = data.draw(streams(kind))
    stops = data.draw(stops_for(tokenizer, token_ids))
    assert run(tokenizer, token_ids, stops) == reference(tokenizer, token_ids, stops)


@settings(max_examples=60, deadline=None)
@given(
    token_ids=st.lists(st.integers(3, len(byte_level()) - 1), min_size=60, max_size=200),
    at=st.floats(0, 0.9),
    data=st.data(),
)
def test_long_random_bytes(token_ids, at, data):
    tokenizer = byte_level()
    whole = decode(tokenizer, token_ids)
    stop = whole[int(at * len(whole)) :][: data.draw(st.integers(1, 6))].strip("\ufffd")
    stops = [stop] if stop and "\ufffd" not in stop else ["never there"]
    assert run(tokenizer, token_ids, stops) == reference(tokenizer, token_ids, stops)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_long_stream_is_decoded_in_bounded_windows(kind, monkeypatch):
    tokenizer = TOKENIZERS[kind]()
    lengths = []
    monkeypatch.setattr(detokenizer, "decode", lambda t, ids, *special: lengths.append(len(ids)) or decode(t, ids))
    unit = tokenizer.encode("".join(TEXTS), add_special_tokens=False)
    token_ids = (unit * 40)[:1500]
    state = TextState(tokenizer, ("never there",))
    assert not any(state.push(token) for token in token_ids)
    assert max(lengths) <= 20
    assert len(lengths) < 1.5 * len(token_ids)
    assert state.text == decode(tokenizer, token_ids)


@pytest.mark.parametrize("token", [0, 1, "garbage"])
def test_endless_special_tokens_and_garbage_stay_bounded(token, monkeypatch):
    tokenizer = byte_level()
    if token == "garbage":
        token = next(t for t in range(3, len(tokenizer)) if decode(tokenizer, [t]) == "\ufffd")
    lengths = []
    monkeypatch.setattr(detokenizer, "decode", lambda t, ids, *special: lengths.append(len(ids)) or decode(t, ids))
    state = TextState(tokenizer, ("STOP",))
    assert not any(state.push(token) for _ in range(500))
    assert max(lengths, default=0) <= MAX_WINDOW_TOKENS
    stop = tokenizer.encode("STOP", add_special_tokens=False)
    assert [state.push(each) for each in stop] == [False] * (len(stop) - 1) + [True]
    assert state.text == decode(tokenizer, [token] * 500)


def test_without_stop_strings_nothing_is_decoded_before_the_end(monkeypatch):
    tokenizer = byte_level()
    state = TextState(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(detokenizer, "decode", None)
        assert not any(state.push(token) for token in range(3, 60))
    assert state.text == decode(tokenizer, list(range(3, 60)))


def test_the_first_of_several_stop_strings_cuts():
    tokenizer = byte_level()
    token_ids = tokenizer.encode("one two three", add_special_tokens=False)
    assert run(tokenizer, token_ids, ["three", "wo t"])[1] == "one t"
    assert run(tokenizer, token_ids, ["one"])[1] == ""


def generate(token_ids, **options):
    options = {"max_tokens": 100, "stops": (), "eos_token_ids": [1], "ignore_eos": False} | options
    state = GenerationState(byte_level(), **options)
    for token_id in token_ids:
        if state.push(token_id):
            break
    return state


def test_finish_reasons():
    hello = byte_level().encode("hello", add_special_tokens=False)
    assert len(hello) > 2
    state = generate([*hello, 1, *hello])
    assert (state.finish_reason, state.text, state.generated_tokens) == ("stop", "hello", len(hello) + 1)
    state = generate(hello, max_tokens=2)
    assert (state.finish_reason, state.generated_tokens) == ("length", 2)
    state = generate([*hello, 1, *hello], ignore_eos=True)
    assert (state.finish_reason, state.text) == (None, "hellohello")
    state = generate([*hello, *hello], stops=("oh",))
    assert (state.finish_reason, state.text) == ("stop", "hell")


def test_the_last_allowed_token_may_still_be_a_stop():
    hello = byte_level().encode("hello", add_special_tokens=False)
    assert generate([*hello, 1], max_tokens=len(hello) + 1).finish_reason == "stop"
    assert generate(hello, max_tokens=len(hello), stops=("lo",)).finish_reason == "stop"


def test_an_end_token_without_special_mark_is_no_text():
    [token] = byte_level().encode("x", add_special_tokens=False)
    assert generate([token], eos_token_ids={token}).text == ""


def test_skipped_tokens_never_become_the_only_context():
    """The space of a decoded text's first token is stripped: after many special tokens it must still be seen."""
    tokenizer = metaspace()
    a, hello = tokenizer.convert_tokens_to_ids(["▁a", "▁hello"])
    token_ids = [a, *[tokenizer.eos_token_id] * 200, hello]
    assert run(tokenizer, token_ids, [" hello"]) == (202, "a")


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_stop_string_may_be_or_hold_a_special_token(kind):
    tokenizer = TOKENIZERS[kind]()
    hello, end = tokenizer.encode("hello", add_special_tokens=False), tokenizer.eos_token_id
    tokens = [*hello, end, *hello]
    assert run(tokenizer, tokens, ["</s>"]) == (len(hello) + 1, "hello")
    assert run(tokenizer, tokens, ["o</s>"]) == (len(hello) + 1, "hell")
    assert run(tokenizer, tokens, ["never", "llo</s>"]) == (len(hello) + 1, "he")
    count, text = run(tokenizer, tokens, ["</s>" + tokenizer.decode([end, *hello])[4:8]])
    assert count is not None
    assert count > len(hello) + 1
    assert text == "hello"
    assert run(tokenizer, tokens, ["s"])[0] is None, "part of a special token's text is no text"
    assert run(tokenizer, [*tokens, end], ["</s></s>"])[0] is None


def test_special_tokens_alone_are_found_after_any_length():
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("".join(TEXTS) * 6, add_special_tokens=False), 0, 2, 1]
    count, text = run(tokenizer, tokens, ["<|assistant|></s>"])
    assert (count, text) == (len(tokens), decode(tokenizer, tokens[:-3]))
    assert generate([5, 6, 1, 7], stops=("</s>",), ignore_eos=True).generated_tokens == 3
