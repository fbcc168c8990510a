"""ARCHITECTURE.md and the table of docs/planner.md name files that exist."""

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
