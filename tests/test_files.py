"""Small files: whole or as they were, bounded when read, and disk errors as sentences."""

import errno
import os
from itertools import pairwise

import pytest

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import (
    absolute_or_none,
    make_absolute,
    read_csv,
    read_json,
    read_json_lines,
    read_yaml,
    refuse_unwritable,
    write_json,
    write_whole,
)


def test_a_file_is_replaced_whole_with_its_mode(tmp_path):
    write_json(tmp_path / "file", {"a": [1]})
    assert read_json(tmp_path / "file", "file", "mend it") == {"a": [1]}
    write_whole(tmp_path / "secret", "x", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "secret"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 2000])
def test_what_is_no_json_is_one_sentence(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match="mend it"):
        read_json(tmp_path / "file", "thing", "mend it", most_bytes=1000)
    with pytest.raises(UserError, match="mend it"):
        read_json(tmp_path / "none", "thing", "mend it")


def test_only_disk_errors_become_sentences(tmp_path):
    for number in (errno.ENOSPC, errno.EROFS):
        with pytest.raises(UserError, match="cannot be written"), refuse_unwritable(tmp_path):
            raise OSError(number, "x", "file")
    with pytest.raises(FileNotFoundError), refuse_unwritable(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": NaN}', "NaN"),
        (b"[1e400]", "finite"),
        (b"[-Infinity]", "finite"),
        (b"1" * 400, "400 digits"),
        (b"[" * 70 + b"]" * 70, "64 levels"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "'c' stands twice"),
        (b'["\\ud800"]', "half a character"),
        (b'"\xe9"', "not UTF-8"),
    ],
)
def test_json_from_outside_is_bounded(tmp_path, data, reason):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=f"{reason}.*; mend it\\.$"):
        read_json(tmp_path / "file", "thing", "mend it")


def test_a_byte_order_mark_is_no_mistake_and_infinity_may_be_asked_for(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf[Infinity, 1e400, 3]")
    assert read_json(tmp_path / "file", "thing", "mend it", infinity=True) == [float("inf"), float("inf"), 3]


def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (("pipe", "named pipe"), ("loop", "symbolic links"), ("", "a folder"), ("a\0b", "null")):
        with pytest.raises(UserError, match=f"{reason}.*; mend it"):
            read_json(f"{tmp_path}/{name}", "thing", "mend it")
    with pytest.raises(UserError, match="it is a device"):
        read_json("/dev/zero", "thing", "mend it")


def test_csv_rows_have_the_cells_of_their_header():
    assert list(read_csv("a,b\n1,2\n\n3,4\n", "table", "mend it", ["a"])) == [
        (2, {"a": "1", "b": "2"}),
        (4, {"a": "3", "b": "4"}),
    ]
    for text in ("b\n1\n", "a,a\n1,2\n", "a,b\n1\n", "a,b\n1,2,3\n", "a,b\n" + "x" * 200_000 + ",1\n", ""):
        with pytest.raises(UserError, match=r"^table .*; mend it\.$"):
            list(read_csv(text, "table", "mend it", ["a"]))


def test_json_lines_name_their_line(tmp_path):
    (tmp_path / "file").write_text('{"a": 1}\n\n[2]\n')
    assert list(read_json_lines(tmp_path / "file", "rows", "mend it")) == [(1, {"a": 1}), (3, [2])]
    (tmp_path / "file").write_text('{"a": 1}\n{"a": NaN}\n')
    with pytest.raises(UserError, match="line 2"):
        list(read_json_lines(tmp_path / "file", "rows", "mend it"))


def test_a_refusal_is_fit_for_a_terminal_and_short():
    message = str(UserError("\x1b[2Jname\x9b\u202e\ud800\u2028 " + "x" * 60_000 + " the remedy"))
    assert len(message) < 1_500
    assert message.endswith("the remedy")
    assert len(str(UserError("\x1b\u2028" * 60_000))) < 1_500
    assert message.startswith("\\x1b[2Jname\\x9b\\u202e\\ud800\\u2028 x")
    assert str(UserError("two\nlines of Grüße")) == "two\nlines of Grüße"
    assert len(quote(list(range(10**6)))) <= 60
    assert len(quote(10**9000)) <= 60


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "a: &a [x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in pairwise("abcdefghij")),
            "values",
        ),
        ("a: &x [*x]\n", "values"),
        ("- " * 80 + "1\n", "levels"),
        ("a: !!python/object/apply:os.system [x]\n", "the tag"),
        ("a: !!timestamp x\n", "the tag"),
        ("a: ${oc.env:HOME}\n", "filled in from elsewhere"),
        ("a: ${gib:${oc.env:HOME}}\n", "filled in from elsewhere"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [\n", "line 2"),
    ],
)
def test_yaml_from_outside_is_plain_values(tmp_path, text, reason):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=f"{reason}.*; mend it"):
        read_yaml(tmp_path / "file", "thing", "mend it")


def test_yaml_may_repeat_a_few_values_and_count_in_gib(tmp_path):
    (tmp_path / "file").write_text("a: &x {b: 1e3}\nc: [*x, *x]\nd: ${gib:2}\n")
    assert read_yaml(tmp_path / "file", "thing", "mend it") == {"a": {"b": 1e3}, "c": [{"b": 1e3}] * 2, "d": "${gib:2}"}


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(UserError, match="empty path"):
        make_absolute("")
    assert absolute_or_none(None) is None
