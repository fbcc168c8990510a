"""Reads past answers as examples from JSON lines, CSV, parquet, LMSYS-Chat-1M, or this project's own results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import open_regular, parse_json, read_csv, read_json, read_json_lines, read_text

LAYOUTS = ("auto", "rows", "lmsys", "results")
ROUNDS = ("single", "multi")
# names that data sets use for the same column; the first one found counts
_TEXT = ("text", "prompt", "prompt_content", "prompt_text", "input", "user_prompt")
_ANSWER = ("response", "answer", "output", "completion")
_LENGTH = ("output_tokens", "completion_tokens", "output_token_length", "response_length", "length", "GeneratedTokens")
_PROMPT_LENGTH = ("prompt_tokens", "prompt_token_length", "ContextTokens")
_MODEL = ("model", "model_name")
_CONVERSATION = ("conversation", "conversations", "messages")
WORD = re.compile(r"\w+|[^\w\s]")

Counter = Callable[[str], int]
MOST_TOKENS = 10**9
_MOST_BYTES = 4 << 30
Tokens = Annotated[int, Ge(0), Le(MOST_TOKENS)]
_REMEDY = "give JSON lines, CSV or parquet"


@dataclass(frozen=True)
class Example:
    """One answer: its prompt (with earlier turns), the model that answered, and the length.

    `conversation` keeps the turns of a conversation in one split. `cut`: the answer reached its token limit, so
    `output_tokens` is a lower bound. `output_tokens` is None if only the prompt is known.
    """

    text: str
    output_tokens: Tokens | None
    model: str = ""
    prompt_tokens: Tokens = 0
    conversation: str = ""
    turn: Tokens = 0
    cut: bool = False


def count_words(text: str) -> int:
    """Words and punctuation marks, which stand for tokens when there is no tokenizer."""
    return sum(1 for _ in WORD.finditer(text))


def make_counter(folder: str | None) -> Counter:
    """Counts tokens with the tokenizer of a local folder, or words without one. `UserError`: the folder or the
    tokenizer is missing."""
    if folder is None:
        return count_words
    from ds_llmpq.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(Path(folder).expanduser()), False)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def read_examples(
    path: Path,
    layout: str = "auto",
    rounds: str = "single",
    batch_input: Path | None = None,
    count: Counter = count_words,
    answered: bool = True,
) -> list[Example]:
    """Examples of a file; with `answered=False` also prompts without an answer.

    `UserError`: unreadable, an unknown layout, or no example.
    """
    if layout not in LAYOUTS or rounds not in ROUNDS:
        raise UserError(
            f"lengths.layout is {layout!r} and lengths.rounds is {rounds!r}, but they must be one of "
            f"{', '.join(LAYOUTS)} and {', '.join(ROUNDS)}."
        )
    rows = _read_rows(path)
    if layout == "results" or (layout == "auto" and rows and {"custom_id", "response"} <= rows[0].keys()):
        found = list(_from_results(rows, batch_input, path))
    else:
        found = [example for number, row in enumerate(rows) for example in _from_row(row, number, rounds, count)]
    if answered:
        found = [example for example in found if example.output_tokens is not None and example.output_tokens > 0]
    if not found:
        raise UserError(
            f"{path} holds no usable example; rows need a prompt or conversation and a response or output_tokens."
        )
    return found


def read_batch_examples(path: Path, count: Counter = count_words) -> list[tuple[str, Example]]:
    """(custom_id, example) for each request of an OpenAI batch file."""
    rows = _read_rows(path)
    return [(str(row.get("custom_id")), _read_request(row, count)) for row in rows if isinstance(row.get("body"), dict)]


def join_turns(messages: Iterable[tuple[str, str]]) -> str:
    """The turns as one text; a single user turn stays as it is."""
    turns = list(messages)
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv or .parquet file, else of JSON lines or one JSON list."""
    try:
        if path.is_dir():
            # downloaded data sets keep their files in data/
            files = _list_data_files(path) or _list_data_files(path / "data")
            if not files:
                raise UserError(f"{path} holds no .parquet, .jsonl or .csv file; give the file itself.")
            return [row for file in files for row in _read_rows(file)]
        if path.suffix == ".parquet":
            open_regular(path, "data", "give a parquet table").close()
            return _read_parquet(path)
        if path.suffix == ".csv":
            text = read_text(path, "file of answers", _REMEDY, _MOST_BYTES)
            return [row for _, row in read_csv(text, f"file of answers {path}", _REMEDY)]
        return list(_read_json_rows(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_REMEDY}.") from None


def _read_json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of JSON lines, or of one JSON list."""
    what = "file of answers"
    with open_regular(path, what, _REMEDY, _MOST_BYTES) as file:
        is_list = file.read(1 << 16).decode(errors="ignore").lstrip("\ufeff \n\r\t").startswith("[")
    values = enumerate(read_json(path, what, _REMEDY, _MOST_BYTES)) if is_list else read_json_lines(path, what, _REMEDY)
    for number, row in values:
        if not isinstance(row, dict):
            raise UserError(f"{path} holds rows that are not objects (row {number}); give one JSON object per line.")
        yield row


def _list_data_files(folder: Path) -> list[Path]:
    return [file for suffix in ("parquet", "jsonl", "csv") for file in sorted(folder.glob(f"*.{suffix}"))]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow; install ds_llmpq[lengths], or give JSON lines or CSV.") from None
    try:
        known = {*_TEXT, *_ANSWER, *_LENGTH, *_PROMPT_LENGTH, *_CONVERSATION, *_MODEL, "conversation_id", "turn"}
        names = [name for name in parquet.read_schema(path).names if name in known]
        return parquet.read_table(path, columns=names).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet ({error}).") from None


def _find_first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _from_row(row: dict[str, Any], number: int, rounds: str, count: Counter) -> Iterator[Example]:
    """A row is a prompt with its answer, or a conversation, of which one or all answers are taken."""
    model, conversation = str(_find_first(row, _MODEL) or ""), str(row.get("conversation_id") or number)
    messages = _read_messages(_find_first(row, _CONVERSATION))
    if messages:
        yield from _split_turns(messages, model, conversation, rounds, count)
        return
    text = _find_first(row, _TEXT)
    if not isinstance(text, str):
        return
    answer, length, prompt = (_find_first(row, names) for names in (_ANSWER, _LENGTH, _PROMPT_LENGTH))
    tokens = _read_length(length) if length is not None else count(answer) if isinstance(answer, str) else None
    turn = _read_length(row.get("turn") or 0) or 0
    if rounds == "multi" or turn == 0:
        yield Example(
            text, tokens, model, _read_length(prompt) or count(text), conversation, turn, bool(row.get("cut"))
        )


def _split_turns(messages: list, model: str, conversation: str, rounds: str, count: Counter) -> Iterator[Example]:
    turn = 0
    for place, (role, content) in enumerate(messages):
        if role != "assistant" or place == 0:
            continue
        text = join_turns(messages[:place])
        yield Example(text, count(content), model, count(text), conversation, turn)
        turn += 1
        if rounds == "single":
            return
    if messages[-1][0] == "user" and (turn == 0 or rounds == "multi"):  # asked, not answered yet
        text = join_turns(messages)
        yield Example(text, None, model, count(text), conversation, turn)


def _read_messages(value: Any) -> list[tuple[str, str]]:
    """(role, content) of each message; CSV files hold the conversation as JSON text."""
    if isinstance(value, str):
        try:
            value = parse_json(value, "", "")
        except UserError:
            return []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return []
    roles = {"human": "user", "gpt": "assistant"}
    pairs = [
        (message.get("role") or message.get("from"), message.get("content") or message.get("value"))
        for message in value
    ]
    return [(roles.get(str(role), str(role)), _read_content(content)) for role, content in pairs if content is not None]


def _read_content(content: Any) -> str:
    """A message's text; content may be a list of text parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def _from_results(rows: list[dict[str, Any]], batch_input: Path | None, path: Path) -> Iterator[Example]:
    """Answers of results.jsonl with the prompts of their batch file. Lengths are those that the run counted."""
    if batch_input is None:
        raise UserError(f"{path} holds answers without prompts; give the batch file they answer as lengths.input=FILE.")
    requests = dict(read_batch_examples(batch_input))
    for row in rows:
        body = _get_object(_get_object(row, "response"), "body")
        request, usage = requests.get(str(row.get("custom_id"))), _get_object(body, "usage")
        if request is None or not usage:
            continue
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        yield Example(
            text=request.text,
            output_tokens=_read_length(usage.get("completion_tokens")),
            model=str(body.get("model") or request.model),
            prompt_tokens=_read_length(usage.get("prompt_tokens")) or request.prompt_tokens,
            conversation=str(row["custom_id"]),
            cut=choice.get("finish_reason") == "length",
        )


def _get_object(row: dict[str, Any], name: str) -> dict[str, Any]:
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def _read_request(row: dict[str, Any], count: Counter) -> Example:
    body = row["body"]
    prompt = body.get("prompt")
    messages = _read_messages(body.get("messages"))
    if messages:
        text = join_turns(messages)
    else:  # token ids mean little without their tokenizer, but prompts can still be told apart
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt if isinstance(prompt, list) else []))
    return Example(text, None, str(body.get("model") or ""), count(text), str(row.get("custom_id")))


def _read_length(value: Any) -> int | None:
    try:
        number = None if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if number is not None and not 0 <= number <= MOST_TOKENS:
        raise UserError(
            f"A length is {quote(value)} but must be a whole number of tokens, at most {MOST_TOKENS}; correct it."
        )
    return None if number is None else int(number)
