"""sensitivity.json: what is written reads back the same, and every broken file is one clear sentence."""

import json
import random

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.sensitivity.table import Sensitivity, read_sensitivity, write_sensitivity


def draw_table(generator):
    bits = tuple(generator.sample((2, 3, 4, 8, 16), generator.randrange(1, 6)))
    rows = generator.randrange(1, 6)
    return Sensitivity(
        method="variance",
        provenance="estimated",
        bits=bits,
        table=tuple(tuple(generator.random() * 10 ** -generator.randrange(9) for _ in bits) for _ in range(rows)),
        model_fingerprint="abc",
        calibration_hash=None,
        details={"rows": 3, "text": "x"},
        head={width: generator.random() for width in generator.sample((3, 4, 8), generator.randrange(3))},
    )


def test_round_trip(tmp_path):
    generator = random.Random(1)
    for _ in range(20):
        table = draw_table(generator)
        write_sensitivity(tmp_path / "sensitivity.json", table)
        assert read_sensitivity(tmp_path / "sensitivity.json") == table


def test_columns_by_width():
    table = Sensitivity("x", "measured", (8, 4), ((1.0, 2.0), (3.0, 4.0)))
    assert table.select_bits([4, 16, 8]) == ((2.0, 0.0, 1.0), (4.0, 0.0, 3.0))
    with pytest.raises(UserError, match="no column for 3 bits"):
        table.select_bits([3])


def test_an_lm_head_costs_nothing_at_16_bits_and_what_is_written_below():
    table = Sensitivity("x", "measured", (8,), ((1.0,),), head={8: 0.5})
    assert (table.head_loss(16), table.head_loss(8)) == (0.0, 0.5)
    with pytest.raises(UserError, match=r"lm_head at 4 bits loses; make it again with quant\.lm_head_bits=4"):
        table.head_loss(4)


def test_other_model():
    table = Sensitivity("x", "measured", (8,), ((1.0,), (3.0,)), model_fingerprint="one")
    table.check_model(2, "one")
    table.check_model(2)
    with pytest.raises(UserError, match="2 layers, but the model has 3"):
        table.check_model(3)
    with pytest.raises(UserError, match="fingerprint one"):
        table.check_model(2, "two")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"head": [1.0]}, r"head is \[1.0\], but must be an object"),
        ({"head": {"x": 1.0}}, "head has the key 'x', but must be one of 1"),
        ({"head": {"16": 1.0}}, "head has the key '16', but must be one of 1"),
        ({"head": {"8": "x"}}, r"head\.8 is 'x', but must be a valid number"),
        ({"head": {"8": -1.0}}, r"head\.8 is -1.0"),
        ({"unit": "bits"}, "unit is 'bits'"),
        ({"provenance": "guessed"}, "provenance is 'guessed'"),
        ({"bits": []}, "at least 1"),
        ({"bits": [4, 4]}, "each width once"),
        ({"bits": "48"}, "bits is '48', but must be a valid array"),
        ({"bits": [8.5, 4]}, r"bits\[0\] is 8.5, but must be a valid integer"),
        ({"table": []}, "at least 1"),
        ({"table": [[1.0]]}, "row 0 has 1 entries"),
        ({"table": [[1.0, -2.0]]}, r"table\[0\]\[1\] is -2.0"),
        ({"table": [[1.0, "x"]]}, r"table\[0\]\[1\] is 'x'"),
        ({"table": [[1.0, True]]}, r"table\[0\]\[1\] is True"),
        ({"table": {"0": [1, 2]}}, "table is .* must be a valid array"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_broken_files(tmp_path, change, words):
    file = tmp_path / "sensitivity.json"
    write_sensitivity(file, Sensitivity("x", "measured", (8, 4), ((1.0, 2.0),)))
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, **change}))
    with pytest.raises(UserError, match=words):
        read_sensitivity(file)


@pytest.mark.parametrize("asked", ["omega.json", "sensitivity.json"])
def test_a_file_of_the_former_name_is_read_and_the_present_one_named(tmp_path, capsys, asked):
    table = Sensitivity("x", "measured", (8,), ((1.0,),))
    write_sensitivity(tmp_path / "omega.json", table)
    assert read_sensitivity(tmp_path / asked) == table
    assert "is now called sensitivity.json" in capsys.readouterr().err


def test_unreadable_files(tmp_path):
    file = tmp_path / "sensitivity.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_sensitivity(file)
    for text, words in (("{", "cannot be read"), ("[]", "must be an object"), ("{}", "lacks the key 'schema'")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            read_sensitivity(file)
    write_sensitivity(file, Sensitivity("x", "measured", (8,), ((1.0,),)))
    file.write_text(file.read_text().replace("1.0", "NaN"))
    with pytest.raises(UserError, match="NaN"):
        read_sensitivity(file)
