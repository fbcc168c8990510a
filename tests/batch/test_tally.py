"""Counting what is done from the files, and noticing that they are taken away."""

import pytest

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import RowError
from ds_llmpq.batch.results import InputRows, Result, ResultWriter
from ds_llmpq.errors import UserError

ROW = '{"custom_id": "%s", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'


@pytest.fixture
def file(tmp_path):
    (tmp_path / "in.jsonl").write_text(ROW % "a" + "{no json\n" + ROW % "b" + ROW % "c")
    return read_requests(tmp_path / "in.jsonl", BatchConfig())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def write(out, file, results="", failed=(), **options):
    """Results of these requests by their letters, error rows of those; returns the writer, which is still open."""
    writer = ResultWriter(out, total=file.total, **options)
    for request in file.requests:
        if request.custom_id in results:
            writer.write_result(Result(request, 1, 1, "y", "stop"))
    for line, custom_id in failed:
        writer.write_error(RowError(line, custom_id, "code", "message"))
    return writer


def count(out, file):
    tally = InputRows.from_file(file).count(out)
    return tally.completed, tally.failed, tally.lacking


def test_every_row_must_stand_in_one_file_once(out, file):
    assert count(out, file) == (0, 0, 4)
    write(out, file, "ac", [(2, None)]).close()
    assert count(out, file) == (2, 1, 1)
    write(out, file, "b", [(2, None)], resume=True).close()
    assert count(out, file) == (3, 1, 0)


def test_a_row_in_both_files_or_twice_is_not_right(out, file):
    write(out, file, "abc", [(2, None), (1, "a")]).close()
    assert count(out, file) == (3, 1, 1)
    write(out, file, "", [(2, None), (2, None)], resume=True).close()
    assert count(out, file) == (3, 1, 1)


def test_rows_of_another_input_do_not_count(out, file, tmp_path):
    write(out, file, "abc", [(2, None)]).close()
    (tmp_path / "in.jsonl").write_text(ROW % "a" + ROW % "z")
    assert count(out, read_requests(tmp_path / "in.jsonl", BatchConfig())) == (1, 0, 1)


def test_torn_last_rows_do_not_count(out, file):
    write(out, file, "abc", [(2, None)]).close()
    for name in ("results.jsonl", "errors.jsonl"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-3])
    assert count(out, file) == (2, 0, 2)


@pytest.mark.parametrize(
    "row",
    [
        "something", "", "[]", '{"custom_id": "a"}', '{"custom_id": 3, "error": {"line": 1}}',
        '{"custom_id": null, "error": {"line": true}}', '{"custom_id": null, "error": {"line": -1}}',
        '{"custom_id": "a", "error": {"line": 1}}, {}',
    ],
)  # fmt: skip
def test_an_error_file_of_another_program_is_refused(out, file, row):
    out.mkdir()
    (out / "errors.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=r"line 1 of .*errors.jsonl.* that is no error row"):
        count(out, file)


@pytest.mark.parametrize("how", ["deleted", "replaced", "cut"])
def test_results_taken_away_while_they_are_written_are_missed(out, file, how):
    writer = write(out, file, "ab")
    writer.sync()
    results = out / "results.jsonl"
    if how == "cut":
        results.write_bytes(b"")
    else:
        kept = results.read_bytes()
        results.unlink()
        if how == "replaced":
            results.write_bytes(kept)
    for attempt in (writer.sync, writer.close):
        with pytest.raises(UserError, match=r"results.jsonl was deleted, replaced or cut .*same command serves"):
            attempt()
