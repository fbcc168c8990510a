"""Result files: whole rows or none, whatever happens, and never a file that is not ours."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from batch_helpers import chat_row, completion_row, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llmpq import files
from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.jsonl_file import encode_row
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import RowError
from ds_llmpq.batch.results import Result, ResultWriter, format_error, format_result, read_finished
from ds_llmpq.errors import UserError


@pytest.fixture
def results_of(tmp_path):
    def make(count, text="你好\u2028\n\x85x"):
        rows = [(chat_row if i % 2 else completion_row)(f"id-{i}é") for i in range(count)]
        requests = read_requests(write_rows(tmp_path / "in.jsonl", rows), BatchConfig()).requests
        return [Result(request, 3, 2, text * (i + 1), "stop") for i, request in enumerate(requests)]

    return make


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_in_openai_s_batch_format(tmp_path, results_of):
    completion, chat = results_of(2, "text")
    row = format_result(chat, "served")
    body = row["response"]["body"]
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "texttext"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    body = format_result(completion)["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "text"
    error = format_error(RowError(4, None, "invalid_json", "The row is not JSON."))
    assert error["custom_id"] is None
    assert error["error"] == {"code": "invalid_json", "message": "The row is not JSON.", "line": 4}
    assert error["id"] != format_error(RowError(5, None, "invalid_json", "x"))["id"]


def test_rows_are_in_the_file_as_soon_as_they_are_written_and_counted(tmp_path, results_of):
    out = tmp_path / "new" / "out"
    with ResultWriter(out, total=5) as writer:
        for count, result in enumerate(results_of(3), start=1):
            writer.write_result(result)
            assert len(lines(out / "results.jsonl")) == count
        writer.write_error(RowError(9, "e", "code", "Reason."))
        assert [row["custom_id"] for row in lines(out / "errors.jsonl")] == ["e"]
        assert writer.counts == {"total": 5, "completed": 3, "failed": 1}
    assert lines(out / "results.jsonl") == [format_result(result) for result in results_of(3)]
    assert read_finished(out) == {"id-0é", "id-1é", "id-2é"}


def test_two_runs_write_the_same_bytes(tmp_path, results_of):
    for name in ("one", "two"):
        with ResultWriter(tmp_path / name) as writer:
            for result in results_of(4):
                writer.write_result(result)
    assert (tmp_path / "one/results.jsonl").read_bytes() == (tmp_path / "two/results.jsonl").read_bytes()


def test_a_kill_at_any_byte_is_repaired_and_resumed(tmp_path_factory, results_of):
    results = results_of(4)
    whole = b"".join(encode_row(format_result(result)) for result in results)

    @settings(max_examples=120, deadline=None)
    @given(cut=st.integers(0, len(whole)), zeros=st.integers(0, 3))
    def check(cut, zeros):
        out = tmp_path_factory.mktemp("out")
        path = out / "results.jsonl"
        path.write_bytes(whole[:cut] + b"\0" * zeros)
        kept = whole[:cut].count(b"\n")
        ids = {result.request.custom_id for result in results[:kept]}
        assert read_finished(out) == ids
        assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
        with ResultWriter(out, resume=True) as writer:
            assert writer.finished == ids
            for result in results:
                if result.request.custom_id not in writer.finished:
                    writer.write_result(result)
            assert writer.counts["completed"] == 4
        assert path.read_bytes() == whole

    check()


def test_a_folder_with_results_is_refused_unless_resumed(tmp_path, results_of):
    with ResultWriter(tmp_path) as writer:
        writer.write_result(results_of(1)[0])
        writer.write_error(RowError(2, "b", "code", "Reason."))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds 1 results"):
        ResultWriter(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert len(lines(tmp_path / "errors.jsonl")) == 1
    with ResultWriter(tmp_path, resume=True) as writer:
        assert writer.finished == {"id-0é"}
    assert (tmp_path / "errors.jsonl").read_bytes() == b""


def test_two_writers_at_once_are_refused(tmp_path):
    with ResultWriter(tmp_path):
        with pytest.raises(UserError, match="being written"):
            ResultWriter(tmp_path, resume=True)
        with pytest.raises(UserError, match="being written"):
            read_finished(tmp_path)
    ResultWriter(tmp_path).close()


@pytest.mark.parametrize("name", ["results.jsonl", "errors.jsonl"])
@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"id": 3}\n', b"[1]\n", b"\xff\n", b"\n"])
def test_foreign_files_are_refused_and_left_alone(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"line 1 of .*{name} .*(is not a|is no) result row"):
        ResultWriter(tmp_path, resume=True)
    assert (tmp_path / name).read_bytes() == content


def test_lines_without_end_and_pipes_are_refused(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_bytes(b" " * 3000)
    monkeypatch.setattr(files, "MOST_BYTES", 2000)
    with pytest.raises(UserError, match=r"results\.jsonl line 1 has more than 2000 bytes"):
        read_finished(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    os.mkfifo(tmp_path / "results.jsonl")
    with pytest.raises(UserError, match="no regular file"):
        read_finished(tmp_path)


def test_unwritable_outputs_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        ResultWriter(tmp_path / "file")
    with pytest.raises(UserError, match="not a folder"):
        ResultWriter(tmp_path / "file" / "deeper")
    (tmp_path / "out" / "errors.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"errors\.jsonl: Is a directory"):
        ResultWriter(tmp_path / "out")
    (tmp_path / "out" / "errors.jsonl").rmdir()
    ResultWriter(tmp_path / "out").close()  # the failed attempt left no lock


def test_read_only_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            ResultWriter(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@contextmanager
def file_size_limit(size):
    """Writes past `size` fail as on a full disk: first short, then with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_takes_the_torn_row_back(tmp_path, results_of):
    first, second = results_of(2)
    whole = encode_row(format_result(first))
    with ResultWriter(tmp_path) as writer:
        writer.write_result(first)
        with file_size_limit(len(whole) + 50), pytest.raises(UserError, match="rows so far are whole"):
            writer.write_result(second)
        assert (tmp_path / "results.jsonl").read_bytes() == whole
        assert writer.counts["completed"] == 1
        writer.write_result(second)  # there is space again
    assert read_finished(tmp_path) == {"id-0é", "id-1é"}


def test_a_full_disk_at_fsync_is_told(tmp_path, results_of, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ResultWriter(tmp_path, fsync_seconds=0) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="No space left"):
            writer.write_result(results_of(1)[0])


def test_fsync_when_due_and_on_close(tmp_path, results_of, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with ResultWriter(tmp_path, fsync_seconds=1000) as writer:
        synced.clear()
        writer.write_result(results_of(1)[0])
        assert synced == []
    assert len(synced) == 2
    with ResultWriter(tmp_path, fsync_seconds=0, resume=True) as writer:
        synced.clear()
        writer.write_result(results_of(2)[1])
        assert len(synced) == 2


def test_an_interrupted_write_leaves_no_torn_row(tmp_path, results_of, monkeypatch):
    def interrupted(descriptor, data, offset):
        os.lseek(descriptor, offset, os.SEEK_SET)
        os.write(descriptor, data[:20])
        raise KeyboardInterrupt

    first, second = results_of(2)
    with ResultWriter(tmp_path) as writer:
        writer.write_result(first)
        monkeypatch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.write_result(second)
    assert (tmp_path / "results.jsonl").read_bytes() == encode_row(format_result(first))


def test_rows_survive_kill_9(tmp_path):
    program = f"""
import os, signal
from ds_llmpq.batch.request import Request
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.batch.results import Result, ResultWriter
params = SamplingParams(max_tokens=1)
writer = ResultWriter({str(tmp_path)!r})
for i in range(20):
    writer.write_result(Result(Request(i, i + 1, str(i), "/v1/completions", None, "x", params), 1, 1, "y", "length"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run([sys.executable, "-c", program], check=False)
    assert finished.returncode == -signal.SIGKILL
    assert read_finished(tmp_path) == {str(i) for i in range(20)}


def test_no_file_means_nothing_finished(tmp_path):
    assert read_finished(tmp_path) == set()
    assert list(tmp_path.iterdir()) == []
