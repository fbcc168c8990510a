"""ARCHITECTURE.md and the table of docs/planner.md name files that exist, and a request passes few of them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("text", "folder"), [("ARCHITECTURE.md", "ds_llmpq"), ("docs/planner.md", "ds_llmpq/planner")])
def test_every_file_that_is_named_exists(text, folder):
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / text).read_text()))
    missing = {name for name in named if not (ROOT / folder / name).exists() and not (ROOT / name).exists()}
    assert not missing
    assert len(named) > 10


def test_every_package_has_its_line():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    packages = {path.parent.name for path in (ROOT / "ds_llmpq").glob("*/__init__.py")}
    assert {name for name in packages if f"| `{name}/`" not in text} <= {"__pycache__"}


def test_a_requests_way_is_short():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    steps = text.partition("## A request, in ten steps")[2].partition("Beside this way")[0]
    assert len(set(re.findall(r"`[\w/]+\.py`", steps))) <= 25
