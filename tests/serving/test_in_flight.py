"""Tokens of sequences in flight: kept, bounded, and read again whatever a death leaves of them."""

import json
import os
import random

import pytest

from ds_llmpq.serving import in_flight
from ds_llmpq.serving.in_flight import NAME, InFlight, read_in_flight

ID = "f" * 64


def filled(folder, passes=20):
    kept = InFlight(folder, ID, {7: [1, 2]})
    for step in range(passes):
        kept.add([7, 8, 9], [step, 100 + step, 200 + step])
    return kept


def test_what_is_added_is_read_again(tmp_path):
    kept = filled(tmp_path)
    kept.end(8)
    kept.begin_anew(9)
    found = read_in_flight(tmp_path, ID)  # without a close: a death
    assert found[7] == [1, 2, *range(20)]
    assert found[8] == [100 + step for step in range(20)]  # its result stands in results.jsonl, which is asked first
    assert 9 not in found
    again = InFlight(tmp_path, ID, {7: found[7]})
    again.add([7], [5])
    assert read_in_flight(tmp_path, ID) == {7: [*found[7], 5]}


def test_it_is_gone_when_nothing_is_in_flight(tmp_path):
    kept = filled(tmp_path)
    kept.close()
    assert (tmp_path / NAME).exists()
    kept = InFlight(tmp_path, ID, {3: [1]})
    kept.end(3)
    kept.close()
    assert os.listdir(tmp_path) == []


def test_nothing_there_and_another_run_s(tmp_path):
    assert read_in_flight(tmp_path, ID) == {}
    filled(tmp_path)
    assert read_in_flight(tmp_path, "e" * 64) == {}
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    assert read_in_flight(tmp_path, ID) == {}


def test_a_torn_tail_costs_its_line_alone(tmp_path):
    filled(tmp_path)
    file = tmp_path / NAME
    whole = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        found = read_in_flight(tmp_path, ID)
        lines = sum(end <= cut for end in ends)
        assert len(found.get(7, [])) == max(0, lines - 2) + 2 * (lines > 1)
        assert len(found.get(8, [])) == max(0, lines - 2)
        file.write_bytes(whole[:cut] + b"\0" * 100)  # a power cut may leave zeros
        assert read_in_flight(tmp_path, ID) == found


@pytest.mark.parametrize(
    "line",
    [
        "[]", "7", "null", "{}", '{"row": 1}', '{"row": -1, "tokens": [1]}', '{"row": true, "tokens": [1]}',
        '{"row": 1, "tokens": [1.5]}', '{"row": 1, "tokens": [4294967296]}', '{"row": 1, "tokens": "12"}',
        '{"rows": [1, 2], "tokens": [1]}', '{"rows": 1, "tokens": [1]}', "[" * 100_000, '{"row": 1, "tokens": [NaN]}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_ends_the_reading(tmp_path, line):
    filled(tmp_path, passes=1)
    with open(tmp_path / NAME, "a") as file:
        file.write(line + "\n" + json.dumps({"rows": [7], "tokens": [9]}) + "\n")
    assert read_in_flight(tmp_path, ID) == {7: [1, 2, 0], 8: [100], 9: [200]}


def test_damage_anywhere_never_raises(tmp_path):
    filled(tmp_path)
    file = tmp_path / NAME
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        for tokens in read_in_flight(tmp_path, ID).values():
            assert all(0 <= token < 1 << 31 for token in tokens)


def test_its_size_is_bounded_by_what_is_in_flight(tmp_path, monkeypatch):
    monkeypatch.setattr(in_flight, "_SLACK_BYTES", 2000)
    kept, largest = InFlight(tmp_path, ID, {}), 0
    for row in range(400):  # two at a time, of 50 tokens
        for step in range(50):
            kept.add([row, row + 1], [step, 30_000])
            largest = max(largest, (tmp_path / NAME).stat().st_size)
        kept.end(row)
    assert largest < 2000 + 24 * 150 + 200
    assert read_in_flight(tmp_path, ID)[400] == kept.tokens[400].tolist()


def test_a_full_disk_costs_the_tokens_and_not_the_batch(tmp_path, monkeypatch, capsys):
    kept = filled(tmp_path)
    real = os.write

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    kept.add([7], [3])
    monkeypatch.setattr(os, "write", real)
    kept.add([7], [4])
    kept.end(7)
    kept.close()
    assert capsys.readouterr().err.count("No space left") == 1
    assert os.listdir(tmp_path) == []


def test_it_does_not_write_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in_flight.tmp").symlink_to(tmp_path / "victim")
    filled(tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "mine"
