"""The answers that a run shows at its end."""

import json

from ds_llmpq.report.answers import show_answers


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def completion(custom_id, text):
    return {"custom_id": custom_id, "response": {"body": {"choices": [{"text": text}]}}}


def chat(custom_id, text):
    return {"custom_id": custom_id, "response": {"body": {"choices": [{"message": {"content": text}}]}}}


def test_the_first_answers_in_words_stand_behind_their_prompts(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say\nhello."}]
    requests = [
        {"custom_id": "a", "body": {"prompt": "one"}},
        {"custom_id": "b", "body": {"messages": messages}},
        {"custom_id": "c", "body": {"prompt": "three"}},
    ]
    asked = write_rows(tmp_path / "input.jsonl", requests)
    answered = write_rows(
        tmp_path / "results.jsonl", [completion("c", " \n"), chat("b", "Hello\x1b[31m."), completion("a", "1")]
    )
    assert show_answers(asked, answered) == ["b: Say ⏎ hello. -> Hello\\x1b[31m.", "a: one -> 1"]
    assert show_answers(asked, answered, count=1) == ["b: Say ⏎ hello. -> Hello\\x1b[31m."]


def test_long_answers_are_cut_and_lines_that_are_no_rows_passed_over(tmp_path):
    asked = tmp_path / "input.jsonl"
    asked.write_text('not json\n[1]\n{"custom_id": 7, "body": {"prompt": [1, 2]}}\n')
    answered = write_rows(tmp_path / "results.jsonl", [completion("7", "word " * 100)])
    (line,) = show_answers(asked, answered)
    assert line.startswith("7: [1, 2] -> word")
    assert line.endswith("...")
    assert len(line) <= 140


def test_nothing_is_shown_where_nothing_was_answered(tmp_path):
    answered = write_rows(tmp_path / "results.jsonl", [completion("a", "")])
    assert show_answers(write_rows(tmp_path / "input.jsonl", []), answered) == []


def test_rows_of_another_form_are_passed_over(tmp_path):
    asked = write_rows(tmp_path / "input.jsonl", [{"custom_id": "a", "body": {"prompt": "one"}}])
    asked.write_text("[" * 5_000 + "\n" + "9" * 5_000 + "\n" + asked.read_text())
    rows = [[1], {"custom_id": "x"}, {"custom_id": "x", "response": {"body": {"choices": [{"text": 5}]}}}]
    rows += [{**completion("x", "one"), "custom_id": None}, completion("a", "1")]
    assert show_answers(asked, write_rows(tmp_path / "results.jsonl", rows)) == ["a: one -> 1"]
