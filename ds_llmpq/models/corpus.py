"""Text to calibrate on and to evaluate on: a local file, or what every Python installation carries.

The default text is the standard library's own source: files held out by a hash of their path (one in 20; the small
shipped model has not seen them), in two parts, so that what calibrates never evaluates. It differs between Python
versions; its hash is kept with every number made from it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_llmpq import files
from ds_llmpq.errors import UserError

CALIBRATION, EVALUATION = "calibration", "evaluation"
_MOST_BYTES = 1 << 32
_PARTS = (CALIBRATION, EVALUATION)
# folders that not every installation has, and tables of numbers
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """A text and where it is from."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def words(self) -> int:
        """Parts between white space, as word-level perplexities count them."""
        return len(self.text.split())


def read_text(path: str | Path | None, part: str) -> Text:
    """The file's text (UTF-8), or for None the `part` (calibration, evaluation) of the default text.

    `UserError` for a file that cannot be read as text.
    """
    if path is None:
        return Text(f"standard library, held-out files, {part}", _read_standard_library(part))
    return Text(str(path), files.read_text(path, "text", "give a plain text file in UTF-8", _MOST_BYTES))


def encode(text: Text, tokenizer: Any) -> list[int]:
    """Token ids of the whole text, with the tokenizer's own first token where it puts one."""
    return list(tokenizer(text.text, verbose=False)["input_ids"])


def cut_rows(tokens: list[int], length: int) -> list[list[int]]:
    """Cuts a text so that every token but the first is predicted exactly once.

    Rows of at most `length` + 1 tokens, each beginning with the last of the row before. UserError: under two tokens.
    """
    if len(tokens) < 2:
        raise UserError(f"The text has {len(tokens)} tokens; two are the least that can be scored: give a longer text.")
    return [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]


def calibration_rows(text: Text, tokenizer: Any, rows: int, length: int) -> torch.Tensor:
    """[rows, length + 1] tokens spread evenly over the text. UserError if it is too short for so many rows."""
    tokens = encode(text, tokenizer)
    whole = [row for row in cut_rows(tokens, length) if len(row) == length + 1]
    if len(whole) < rows:
        raise UserError(
            f"Calibration text {text.name} has {len(tokens)} tokens, too short for {rows} rows of {length} tokens; "
            f"give a text of {rows * length + 1} tokens, or fewer or shorter rows."
        )
    return torch.tensor([whole[index * len(whole) // rows] for index in range(rows)])


def _read_standard_library(part: str) -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        number = int(hashlib.sha256(relative.as_posix().encode()).hexdigest(), 16)
        if number % 20 == 0 and _PARTS[number // 20 % 2] == part:
            text = path.read_text(encoding="utf-8", errors="ignore")
            texts += [text] if len(text) > 200 else []
    return "\n\n".join(texts)
