"""Hostfiles and include strings, held against DeepSpeed's own reading of them where it is installed."""

import pytest

from ds_llmpq.cluster.hostfile import (
    find_hostfile_disagreements,
    format_hostfile,
    format_include,
    group_slots,
    order_ranks,
    parse_hostfile,
    write_hostfile,
)
from ds_llmpq.errors import UserError

STAGES = [("b", 2), ("a", 0), ("b", 0), ("c.d-1", 3)]


def test_written_hostfile_and_include_string(tmp_path):
    assert format_hostfile(STAGES) == "b slots=3\na slots=1\nc.d-1 slots=4\n"
    assert format_include(STAGES) == "b:0,2@a:0@c.d-1:3"
    write_hostfile(tmp_path / "hostfile", STAGES)
    assert parse_hostfile(tmp_path / "hostfile") == {"b": 3, "a": 1, "c.d-1": 4}
    assert find_hostfile_disagreements(parse_hostfile(tmp_path / "hostfile"), STAGES) == []


def test_deepspeed_numbers_ranks_as_predicted():
    """Its launcher, given our hostfile and include string, keeps our devices in the order of `order_ranks`."""
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = runner._parse_hostfile(format_hostfile(STAGES).splitlines())
    active = runner.parse_inclusion_exclusion(pool, format_include(STAGES), "")
    numbered = [(host, slot) for host, slots in active.items() for slot in slots]
    assert order_ranks(STAGES) == tuple(numbered.index(stage) for stage in STAGES) == (1, 2, 0, 3)


def test_parse_with_comments(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# all nodes\n\n  node-1   slots=4  # four T4\nnode-2\tslots=2\n")
    assert parse_hostfile(file) == {"node-1": 4, "node-2": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node-1 4\n", r"line 1 is 'node-1 4'; it must read 'host slots=N'"),
        ("a slots=1\nb slots=x\n", "line 2"),
        ("a slots=1 b slots=2\n", "line 1"),
        ("a slots=1\na slots=2\n", "lists host a again"),
        ("a slots=0\n", "at least 1"),
        ("# nothing\n", "lists no host"),
    ],
)
def test_bad_hostfiles(tmp_path, text, words):
    file = tmp_path / "hostfile"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        parse_hostfile(file)


def test_missing_hostfile(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        parse_hostfile(tmp_path / "nothing")


def test_disagreements_are_all_named():
    found = find_hostfile_disagreements({"a": 1, "b": 2}, STAGES)
    assert len(found) == 2
    assert "slot 2 of host b" in found[0]
    assert "host c.d-1" in found[1]


def test_two_stages_on_one_device():
    with pytest.raises(UserError, match="a:0 holds two stages"):
        group_slots([("a", 0), ("b", 0), ("a", 0)])
