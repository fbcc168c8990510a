"""Text to calibrate and to evaluate on: a local file, or what comes with every Python installation and this package.

Evaluation uses source files of the standard library by default. One file in 20 is held out, by a hash of its path; the
small shipped model has not seen these. They are in two parts, so that no text both calibrates and evaluates.
Calibration uses its part, the reference manual of the language, and `texts/`: conversations, stories, languages, data,
mathematics, all written for this package. The text differs between Python versions, so its hash is kept with every
number made from it.
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
from ds_llmpq.wording import pluralize

CALIBRATION, EVALUATION = "calibration", "evaluation"
_MOST_BYTES = 1 << 32
_PARTS = (CALIBRATION, EVALUATION)
_OWN_TEXTS = Path(__file__).parent / "texts"
# folders that some installations lack, and tables of numbers
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """A text and its source."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def words(self) -> int:
        """Words between white space, as in word-level perplexity."""
        return len(self.text.split())


def read_text(path: str | Path | None, part: str) -> Text:
    """The text of a UTF-8 file; None: the `part` (calibration, evaluation) of the default text. `UserError`: not a text
    file."""
    if path is None:
        return Text(f"standard library, held-out files, {part}", _read_standard_library(part))
    return Text(str(path), files.read_text(path, "text", "give a plain text file in UTF-8", _MOST_BYTES))


def read_calibration_texts(path: str | Path | None) -> list[Text]:
    """The text of the file; None: one text of each kind."""
    if path is not None:
        return [read_text(path, CALIBRATION)]
    from pydoc_data.topics import topics

    manual = "\n\n".join(topics[name] for name in sorted(topics))
    own = [Text(file.stem, file.read_text(encoding="utf-8")) for file in sorted(_OWN_TEXTS.glob("*.txt"))]
    return [Text("code", _read_standard_library(CALIBRATION)), Text("manual", manual), *own]


def select_rows(texts: list[Text], tokenizer: Any, rows: int, length: int) -> tuple[torch.Tensor, list[int]]:
    """([about `rows`, length + 1] tokens, the kind of each row). Several texts give rows in turn, a short one fewer. Of
    a single text, each eighth counts as a kind."""
    if len(texts) == 1:
        return select_calibration_rows(texts[0], tokenizer, rows, length), [8 * index // rows for index in range(rows)]
    found = []
    for kind, text in enumerate(texts[:rows]):
        whole = [row for row in cut_rows(encode(text, tokenizer), length) if len(row) == length + 1]
        count = min(rows // len(texts) + (kind < rows % len(texts)), len(whole))
        found += [(index, kind, whole[index * len(whole) // count]) for index in range(count)]
    found.sort(key=lambda entry: entry[:2])  # the first rows are of all kinds, because some methods use only those
    return torch.tensor([row for _, _, row in found]), [kind for _, kind, _ in found]


def encode(text: Text, tokenizer: Any) -> list[int]:
    """Token ids of the whole text, with the start token if the tokenizer adds one."""
    return list(tokenizer(text.text, verbose=False)["input_ids"])


def cut_rows(tokens: list[int], length: int) -> list[list[int]]:
    """Cuts a text into rows of at most `length` + 1 tokens that overlap by one, so that every token but the first is
    predicted exactly once. `UserError`: fewer than two tokens."""
    if len(tokens) < 2:
        raise UserError(
            f"The text has {pluralize(len(tokens), 'token')}; two are the least that can be scored: give a longer text."
        )
    return [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]


def select_calibration_rows(text: Text, tokenizer: Any, rows: int, length: int) -> torch.Tensor:
    """[rows, length + 1] tokens, spread evenly over the text. `UserError`: it is too short."""
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
