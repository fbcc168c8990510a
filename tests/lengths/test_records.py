"""Answers of the past from every layout: rows, LMSYS-Chat-1M, results of a run; splits that do not leak."""

import json

import numpy as np
import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.lengths import dataset
from ds_llmpq.lengths.config import LengthDataConfig
from ds_llmpq.lengths.records import Example, count_words, read_batch_examples, read_examples

CONVERSATION = [
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome, always!"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_a_response_or_a_length(tmp_path):
    file = jsonl(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "a b", "response": "one two three.", "model": "m"},
            {"text": "c", "output_tokens": 7, "prompt_tokens": 9},
            {"prompt": "no answer"},
        ],
    )
    first, second = read_examples(file)
    assert (first.text, first.output_tokens, first.model, first.prompt_tokens) == ("a b", 4, "m", 2)
    assert (second.output_tokens, second.prompt_tokens) == (7, 9)
    assert len(read_examples(file, answered=False)) == 3


def test_lmsys_single_and_multi_round(tmp_path):
    row = {"conversation_id": "c1", "model": "vicuna", "conversation": CONVERSATION, "turn": 2, "language": "English"}
    file = jsonl(tmp_path / "lmsys.jsonl", [row])
    (only,) = read_examples(file, "lmsys")
    assert only == Example("Hi, who are you?", 3, "vicuna", count_words("Hi, who are you?"), "c1", 0)
    first, second = read_examples(file, "lmsys", "multi")
    assert first == only
    assert second.text == "user: Hi, who are you?\nassistant: A model.\nuser: Thanks"
    assert (second.output_tokens, second.turn, second.conversation) == (6, 1, "c1")


def test_csv_and_parquet_hold_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"conversation_id": f"c{n}", "model": "m", "conversation": CONVERSATION} for n in range(3)]
    expected = read_examples(jsonl(tmp_path / "a.jsonl", rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet") == expected
    text = json.dumps(CONVERSATION).replace('"', '""')
    (tmp_path / "a.csv").write_text("conversation_id,model,conversation\n" + f'c0,m,"{text}"\n')
    assert read_examples(tmp_path / "a.csv") == expected[:1]


def test_a_runs_own_results_with_the_prompts_they_answer(tmp_path):
    bodies = [{"messages": CONVERSATION[:1], "model": "tiny"}, {"prompt": "def f("}, {"prompt": [1, 2, 3]}]
    batch = jsonl(tmp_path / "in.jsonl", [{"custom_id": f"r{n}", "body": body} for n, body in enumerate(bodies)])
    choice = {"finish_reason": "length"}
    body = {"model": "tiny", "choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 5}}
    rows = [{"custom_id": "r1", "response": {"body": body}, "error": None}]
    rows.append({"custom_id": "r2", "response": None, "error": {"code": "x"}})
    (found,) = read_examples(jsonl(tmp_path / "results.jsonl", rows), batch_input=batch)
    assert found == Example("def f(", 5, "tiny", 11, "r1", 0, cut=True)
    assert [name for name, _ in read_batch_examples(batch)] == ["r0", "r1", "r2"]
    assert read_batch_examples(batch)[2][1].text == "1 2 3"
    with pytest.raises(UserError, match=r"lengths\.input=FILE"):
        read_examples(tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("1\n", "not objects"),
        ('{"prompt": "x"}', "no usable"),
        ('{"text": "x", "length": "y"}', "y"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, said):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_examples(tmp_path / "x.jsonl")


def many(count=100, turns=2):
    return [
        Example(f"t{n} {turn}", n + 1, f"m{n % 2}", 2, f"c{n}", turn) for n in range(count) for turn in range(turns)
    ]


def test_no_conversation_is_in_two_splits_and_shares_are_kept():
    data = dataset.split(many(), LengthDataConfig())
    sets = [{example.conversation for example in getattr(data, name)} for name in dataset.SPLITS]
    assert [len(found) for found in sets] == [60, 20, 20]
    assert len(set.union(*sets)) == 100
    assert dataset.split(many(), LengthDataConfig(seed=1)) != data
    assert dataset.split(many(), LengthDataConfig()) == data


def test_one_model_and_data_size():
    found = dataset.select_examples(many(), LengthDataConfig(model="m1", limit=30))
    assert len(found) == 30
    assert {example.model for example in found} == {"m1"}
    with pytest.raises(UserError, match="has m0, m1"):
        dataset.select_examples(many(), LengthDataConfig(model="m2"))


def test_prepared_data_comes_back_and_changes_are_noticed(tmp_path):
    data = dataset.split(many(), LengthDataConfig())
    dataset.write(tmp_path, data, LengthDataConfig())
    assert dataset.read(tmp_path) == data
    records = tmp_path / dataset.RECORDS_NAME
    records.write_text(records.read_text().replace('"output_tokens": ', '"output_tokens": 9', 1))
    with pytest.raises(UserError, match="was changed"):
        dataset.read(tmp_path)


def test_truncation_keeps_the_tail_or_head_and_tail():
    words = list(range(20))
    assert dataset.truncate(words, 8, "tail") == words[-8:]
    assert dataset.truncate(words, 8, "head_tail") == [0, 1, *words[-6:]]
    assert dataset.truncate(words, 1, "head_tail") == [19]
    assert dataset.truncate(words, 20, "tail") == words
    with pytest.raises(UserError, match=r"lengths\.truncation"):
        dataset.truncate(words, 8, "middle")


def test_lengths_are_floats():
    assert dataset.collect_lengths(many(2, 1)).tolist() == [1.0, 2.0]
    assert dataset.collect_lengths(many(2, 1)).dtype == np.float64


def test_the_published_columns_and_a_data_set_as_downloaded(tmp_path):
    (tmp_path / "lmsys" / "data").mkdir(parents=True)
    text = "model_name,prompt_content,response_length\nvicuna-13b,How are you?,17\nkoala-13b,Why?,5\n"
    (tmp_path / "lmsys" / "data" / "train.csv").write_text(text)
    found = read_examples(tmp_path / "lmsys", "lmsys")
    assert [(each.model, each.text, each.output_tokens) for each in found] == [
        ("vicuna-13b", "How are you?", 17),
        ("koala-13b", "Why?", 5),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        read_examples(tmp_path / "empty")
