"""Small files: whole or as they were, bounded when read, and disk errors as sentences."""

import errno
import os

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json, unwritable_as_mistake, write_json, write_whole


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
        with pytest.raises(UserError, match="cannot be written"), unwritable_as_mistake(tmp_path):
            raise OSError(number, "x", "file")
    with pytest.raises(FileNotFoundError), unwritable_as_mistake(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "x")
