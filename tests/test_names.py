"""One name, one meaning: no class or file name stands twice in the package."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ds_llmpq"


def twice(names):
    return {name for name, count in Counter(names).items() if count > 1}


def test_no_class_name_stands_twice():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]
    found = twice(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not found, f"give {sorted(found)} names of their own"


def test_no_file_name_stands_twice():
    # a command is named like the file it calls; a package's configuration is always config.py
    files = [file.name for file in PACKAGE.rglob("*.py") if file.parent.name != "commands"]
    found = twice(files) - {"__init__.py", "__main__.py", "config.py"}
    assert not found, f"give {sorted(found)} names of their own"
