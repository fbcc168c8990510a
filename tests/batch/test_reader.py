"""The reader: rows and error rows from any bytes, user errors for files nothing can be made of."""

import bz2
import gzip
import hashlib
import json
import lzma
import sys

import pytest
from batch_helpers import chat_row, completion_row, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.reader import MAX_NESTING, read_requests, refuse_unservable
from ds_llmpq.errors import UserError


def read(path, **defaults):
    return read_requests(path, BatchConfig(**defaults))


def read_bytes(tmp_path, data, **defaults):
    path = tmp_path / "input.jsonl"
    path.write_bytes(data)
    return read(path, **defaults)


def codes(file):
    return [(error.line, error.custom_id, error.code) for error in file.errors]


def test_rows_come_in_order_with_line_numbers(tmp_path):
    rows = [json.dumps(chat_row("a")), "", "{bad", "   ", json.dumps(completion_row("b", max_tokens=0)), "[1]"]
    data = ("\n".join([*rows, json.dumps(completion_row("c"))])).encode()
    file = read_bytes(tmp_path, data)
    assert [(r.index, r.line, r.custom_id) for r in file.requests] == [(0, 1, "a"), (4, 7, "c")]
    assert codes(file) == [(3, None, "invalid_json"), (5, "b", "invalid_value"), (6, None, "invalid_type")]
    assert file.total == 5
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    data = b"\xef\xbb\xbf" + json.dumps(chat_row("a")).encode() + b"\r\n\r\n" + json.dumps(chat_row("b")).encode()
    file = read_bytes(tmp_path, data)
    assert [request.custom_id for request in file.requests] == ["a", "b"]
    assert file.errors == []


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (b'{"custom_id": "a"', "invalid_json"),
        (b"\xff\xfe{}", "invalid_encoding"),
        ('{"custom_id": "é'.encode()[:-1], "invalid_encoding"),
        (b'{"custom_id": "\\ud800"}', "invalid_encoding"),
        (b"[" * 100_000, "nesting_too_deep"),
        (b"[" * 5000 + b"]" * 5000, "nesting_too_deep"),
        (b"1" * 5000, "invalid_json"),
        (b"\x00", "invalid_json"),
        (b'{"method": "POST"}', "missing_required_parameter"),
    ],
)
def test_unreadable_rows(tmp_path, row, code):
    file = read_bytes(tmp_path, row + b"\n" + json.dumps(chat_row("z")).encode())
    if row.startswith(b"1") and not hasattr(sys, "get_int_max_str_digits"):
        code = "invalid_type"
    assert codes(file) == [(1, None, code)]
    assert [request.custom_id for request in file.requests] == ["z"]


def test_nesting_limit_is_exact_and_counts_no_brackets_in_text(tmp_path):
    def row(levels):
        value = "x"
        for _ in range(levels - 2):
            value = {"k": value} if levels % 2 else [value]
        return chat_row("a", metadata={"deep": value})  # body, metadata and the row itself are three of the levels

    assert codes(read(write_rows(tmp_path / "ok.jsonl", [row(MAX_NESTING - 1)]))) == []
    assert codes(read(write_rows(tmp_path / "deep.jsonl", [row(MAX_NESTING)]))) == [(1, "a", "nesting_too_deep")]
    assert codes(read(write_rows(tmp_path / "text.jsonl", [chat_row("a", "[{" * 1000)]))) == []


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("NaN", "invalid_json"),
        ("-Infinity", "invalid_json"),
        ('"\\ud800"', "invalid_encoding"),
        ("1e999", "invalid_value"),
    ],
)
def test_rows_that_hold_what_json_does_not_keep_their_id(tmp_path, value, code):
    row = json.dumps(chat_row("a", temperature="VALUE")).replace('"VALUE"', value)
    file = read_bytes(tmp_path, row.encode())
    assert codes(file) == [(1, "a", code)]
    assert codes(read(write_rows(tmp_path / "text.jsonl", [chat_row("a", "NaN and Infinity")]))) == []


def test_whole_surrogate_pairs_are_text(tmp_path):
    file = read_bytes(tmp_path, json.dumps(chat_row("a", "\U0001f600")).encode())
    assert b"\\ud83d" in (tmp_path / "input.jsonl").read_bytes()
    assert file.requests[0].prompt == (("user", "\U0001f600"),)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_size_limit_is_exact(tmp_path, end):
    row = json.dumps(chat_row("a")).encode()
    following = json.dumps(chat_row("b")).encode() if end else b""
    file = read_bytes(tmp_path, row + end + following, max_row_bytes=len(row))
    assert file.errors == []
    file = read_bytes(tmp_path, row + end + following, max_row_bytes=len(row) - 1)
    assert codes(file)[0] == (1, None, "row_too_large")
    assert file.total == (2 if end else 1)


def test_a_huge_row_is_skipped_and_hashed(tmp_path):
    data = b'"' + b"x" * 5_000_000 + b'"\n' + json.dumps(chat_row("b")).encode()
    file = read_bytes(tmp_path, data, max_row_bytes=1000)
    assert codes(file) == [(1, None, "row_too_large")]
    assert [(request.line, request.custom_id) for request in file.requests] == [(2, "b")]
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_repeated_custom_id_names_both_lines(tmp_path):
    rows = [chat_row("a"), chat_row("b"), completion_row("c"), chat_row("b")]
    with pytest.raises(UserError, match="custom_id 'b' stands on line 2 and again on line 4"):
        read(write_rows(tmp_path / "input.jsonl", rows))


def test_repeated_custom_id_of_bad_rows_counts_too(tmp_path):
    rows = [chat_row("a", n=3), chat_row("a")]
    with pytest.raises(UserError, match="line 1 and again on line 2"):
        read(write_rows(tmp_path / "input.jsonl", rows))


def test_limit_reads_only_the_first_rows(tmp_path):
    path = write_rows(tmp_path / "input.jsonl", [chat_row("a"), chat_row("b", n=2), chat_row("c"), chat_row("a")])
    file = read(path, limit=3)
    assert [request.custom_id for request in file.requests] == ["a", "c"]
    assert file.total == 3
    assert file.sha256 == hashlib.sha256(b"".join(path.read_bytes().splitlines(True)[:3])).hexdigest()


@pytest.mark.parametrize("data", [b"", b"\n\n  \n", b"\xef\xbb\xbf\n"])
def test_file_without_rows(tmp_path, data):
    with pytest.raises(UserError, match="no rows"):
        read_bytes(tmp_path, data)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read \(No such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="it is a folder"):
        read(tmp_path)


ROWS_BYTES = "".join(json.dumps(chat_row(name, "Grüße")) + "\n" for name in "abc").encode()
NO_BATCH_FILES = {
    "gzip": (gzip.compress(ROWS_BYTES), "compressed by gzip"),
    "bzip2": (bz2.compress(ROWS_BYTES), "compressed by bzip2"),
    "xz": (lzma.compress(ROWS_BYTES), "compressed by xz"),
    "zip": (b"PK\x03\x04" + b"x" * 100, "zip archive"),
    "UTF-16 with its mark": (ROWS_BYTES.decode().encode("utf-16"), "UTF-16"),
    "UTF-16": (ROWS_BYTES.decode().encode("utf-16-le"), "UTF-16"),
    "big-endian UTF-16": (ROWS_BYTES.decode().encode("utf-16-be"), "UTF-16"),
    "UTF-32": (ROWS_BYTES.decode().encode("utf-32"), "UTF-32"),
    "array on one line": (json.dumps([chat_row("a"), chat_row("b")]).encode(), "JSON array"),
    "array a row a line": (b"[\n" + b",\n".join(ROWS_BYTES.splitlines()) + b"\n]\n", "JSON array"),
    "indented array": (json.dumps([chat_row("a"), chat_row("b")], indent=2).encode(), "JSON array"),
    "indented object": (json.dumps(chat_row("a"), indent=2).encode(), "is no batch file"),
    "plain text": (b"What is a pipe?\nAnd a socket?\n", "no row of 2 is a JSON object"),
    "CSV": (b"custom_id,prompt\na,hello\n", "is no batch file"),
    "strings": (b'"one"\n"two"\n', "is no batch file"),
    "binary": (bytes(range(256)) * 40, "is no batch file"),
}


@pytest.mark.parametrize("kind", NO_BATCH_FILES)
def test_what_is_no_batch_file_is_one_sentence(tmp_path, kind):
    data, says = NO_BATCH_FILES[kind]
    with pytest.raises(UserError, match=says) as caught:
        read_bytes(tmp_path, data)
    assert "input.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_with_one_good_row_is_a_batch_file(tmp_path):
    good = json.dumps(chat_row("z")).encode()
    for first in (b"What?", b"[1, 2]", b"[", b"\xff\xfe{}", b"BZ"):
        assert [request.custom_id for request in read_bytes(tmp_path, first + b"\n" + good).requests] == ["z"]


def test_whole_numbers_and_their_strings_are_the_same_custom_id(tmp_path):
    path = write_rows(tmp_path / "input.jsonl", [chat_row(1), chat_row(2), chat_row("1")])
    with pytest.raises(UserError, match="custom_id '1' stands on line 1 and again on line 3"):
        read(path)
    path = write_rows(tmp_path / "input.jsonl", [chat_row(1, n=3), chat_row(2)])
    assert codes(read(path)) == [(1, "1", "unsupported_value")]


def test_defaults_are_checked_before_the_file(tmp_path):
    with pytest.raises(UserError, match=r"batch\.temperature"):
        read(tmp_path / "gone.jsonl", temperature=9)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BODY = st.dictionaries(
    st.sampled_from(["model", "messages", "prompt", "max_tokens", "temperature", "stop", "seed", "n", "logprobs", "x"]),
    JSON_VALUES | st.just([{"role": "user", "content": "hi"}]) | st.integers(-3, 3),
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=3) | JSON_VALUES,
        "method": st.just("POST") | JSON_VALUES,
        "url": st.sampled_from(["/v1/chat/completions", "/v1/completions"]) | JSON_VALUES,
        "body": BODY | JSON_VALUES,
    },
)
LINES = (
    st.binary(max_size=40)
    | JSON_VALUES.map(lambda v: json.dumps(v).encode())
    | ROWS.map(lambda v: json.dumps(v).encode())
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=5), tail=st.binary(max_size=5), max_row_bytes=st.integers(1, 300))
def test_any_bytes_give_rows_or_a_user_error(tmp_path, lines, tail, max_row_bytes):
    data = b"\n".join([*lines, tail])
    try:
        file = read_bytes(tmp_path, data, max_row_bytes=max_row_bytes)
    except UserError:
        return
    assert file.total == len(file.requests) + len(file.errors) > 0
    numbers = [row.line for row in [*file.requests, *file.errors]]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) <= data.count(b"\n") + 1
    for request in file.requests:
        assert request.custom_id
        assert request.prompt
        json.dumps([request.custom_id, request.model, request.prompt], ensure_ascii=False).encode()
    for error in file.errors:
        assert error.code
        assert error.message.endswith(".")
        error.message.encode()


def test_a_file_without_a_servable_row_is_refused_with_its_first_reason(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [chat_row("a") | {"url": "/v1/embeddings"}, {"custom_id": "b"}])
    with pytest.raises(UserError, match=r"no row of \S+ can be served \(2 in all\); line 1: url is .*served\.$"):
        refuse_unservable(read(rows), rows)
    refuse_unservable(read(write_rows(rows, [{"custom_id": "b"}, chat_row("a")])), rows)
