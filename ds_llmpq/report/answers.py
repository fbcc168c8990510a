"""Shows the first answers of a run, shortened for a terminal, so that a user sees whether they make sense."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.files import open_regular, parse_json, read_lines

_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 70, 120
_MOST_ROWS = 1000  # rows that are searched for answers with text


def show_answers(input_file: Path, results_file: Path, count: int = 3) -> list[str]:
    """A line for each of the first `count` answers with text in `results_file`, behind its prompt from `input_file`.
    Only the first `_MOST_ROWS` results are read."""
    answers: dict[str, str] = {}
    for row in _rows(results_file, _MOST_ROWS):
        answer = _answer(row)
        if answer.strip():
            answers[row["custom_id"]] = answer
        if len(answers) == count:
            break
    prompts = _find_prompts(input_file, set(answers))
    return [
        f"{make_printable(custom_id, 40, keep='')}: {_line(prompts.get(custom_id, ''), _PROMPT_CHARACTERS)} -> "
        f"{_line(answer, _ANSWER_CHARACTERS)}"
        for custom_id, answer in answers.items()
    ]


def _find_prompts(input_file: Path, wanted: set[str]) -> dict[str, str]:
    prompts: dict[str, str] = {}
    for row in _rows(input_file):
        if len(prompts) == len(wanted):
            break
        if str(row.get("custom_id")) in wanted and isinstance(row.get("body"), dict):
            prompts[str(row["custom_id"])] = _prompt(row["body"])
    return prompts


def _rows(file: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The JSON objects among the first `most` lines; other lines of an input became error rows."""
    remedy = "give another file"
    with open_regular(file, "rows", remedy) as lines:
        for line in islice(read_lines(lines, f"rows {file}", remedy), most):
            with contextlib.suppress(UserError):
                row = parse_json(line, "row", "mend it")
                if isinstance(row, dict):
                    yield row


def _prompt(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list):
        prompt = body.get("prompt", "")
        return prompt if isinstance(prompt, str) else str(prompt)
    said = [message.get("content") for message in messages if isinstance(message, dict)]
    return next((text for text in reversed(said) if isinstance(text, str)), "")


def _answer(row: dict[str, Any]) -> str:
    """The row's answer; empty if the row has another form, as from an earlier version."""
    try:
        (choice,) = row["response"]["body"]["choices"]
        answer = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, TypeError, ValueError):
        return ""
    return answer if isinstance(answer, str) and isinstance(row.get("custom_id"), str) else ""


def _line(text: str, most: int) -> str:
    """`text` on one line, with a mark for each line end."""
    whole = text.strip().replace("\n", " \u23ce ")
    return make_printable(whole if len(whole) <= most else whole[: most - 3] + "...", most, keep="")
