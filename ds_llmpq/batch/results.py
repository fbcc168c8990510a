"""Result and error rows in OpenAI's batch output format, appended as requests finish.

Every row is one unbuffered write, which survives the death of the process at once, and a power cut after the next fsync
(every few seconds, and on close). Rows hold no times and no random ids, so that two runs of the same input can be
compared byte by byte; `created` is 0.

What is done of a batch is counted from these files. Nothing else decides whether a run is finished: neither
metrics.json nor exit codes, since a launcher ends with code 0 when its child was killed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.batch.jsonl_file import Key, RowFile, check_folder, read_error_keys, sync_folder
from ds_llmpq.batch.reader import RequestFile
from ds_llmpq.batch.request import Request, RowError
from ds_llmpq.errors import UserError

RESULTS_NAME = "results.jsonl"
ERRORS_NAME = "errors.jsonl"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a request. `finish_reason` is `stop` or `length`; `completion_tokens` includes EOS.
    `prompt_token_ids`, `token_ids`: if the request asks for them."""

    request: Request
    prompt_tokens: int
    completion_tokens: int
    text: str
    finish_reason: str
    prompt_token_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None


class ResultWriter:
    """Appends to results.jsonl and errors.jsonl of a folder, which it creates and locks; a context manager.

    `model`: the name for rows that give none. `total`: rows of the input, for the counts. A folder that already holds
    results is refused unless `resume` is set: then a torn last row is cut off, `finished` holds the ids that need not
    run again, and errors.jsonl is emptied, because failed rows are tried again. `among`: ids of the input, if the
    folder may hold results of other rows, which do not count. `UserError`: the folder cannot be written, is in use, or
    holds something else; the disk is full (the row that did not fit is removed).
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        model: str = "",
        total: int = 0,
        resume: bool = False,
        among: Collection[str] | None = None,
        fsync_seconds: float = 5.0,
    ):
        folder = check_folder(out_dir)
        self.model = model
        self.total = total
        with ExitStack() as opened:
            self.results = opened.enter_context(closing(RowFile(folder / RESULTS_NAME)))
            self.finished = self.results.repair()
            if self.finished and not resume:
                raise UserError(
                    f"{folder} already holds {len(self.finished)} results; give another out=DIR or resume this run."
                )
            self.errors = opened.enter_context(closing(RowFile(folder / ERRORS_NAME)))
            self.errors.clear()
            self._files = opened.pop_all()
        sync_folder(folder)
        self.completed = len(self.finished if among is None else self.finished & set(among))
        self.failed = 0
        self._fsync_seconds = fsync_seconds
        self._synced = time.monotonic()

    def write_result(self, result: Result) -> None:
        """Appends a result row; the operating system has it when this returns."""
        self.results.append(format_result(result, self.model))
        self.completed += 1
        self._sync_when_due()

    def write_error(self, error: RowError) -> None:
        """Appends an error row; the operating system has it when this returns."""
        self.errors.append(format_error(error))
        self.failed += 1
        self._sync_when_due()

    @property
    def counts(self) -> dict[str, int]:
        """Rows in the input, with a result (of earlier runs too), and with an error."""
        return {"total": self.total, "completed": self.completed, "failed": self.failed}

    def sync(self) -> None:
        """Makes all rows so far survive a power cut."""
        self.results.sync()
        self.errors.sync()
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and closes both files; a second call does nothing."""
        self._files.close()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sync_when_due(self) -> None:
        if time.monotonic() - self._synced >= self._fsync_seconds:
            self.sync()


def read_finished(out_dir: str | Path) -> set[str]:
    """custom_ids with a result in a folder, after cutting off a torn last row; none if the file is missing.
    `UserError`: results.jsonl is no result file, cannot be read, or is being written."""
    path = Path(out_dir) / RESULTS_NAME
    if not path.exists():
        return set()
    with closing(RowFile(path, create=False)) as file:
        return file.repair()


def format_result(result: Result, model: str = "") -> dict[str, Any]:
    """One row of results.jsonl."""
    request = result.request
    key = _key(request.custom_id)
    choice: dict[str, Any] = {"index": 0}
    if request.is_chat:
        choice["message"] = {"role": "assistant", "content": result.text}
    else:
        choice["text"] = result.text
    choice |= {"logprobs": None, "finish_reason": result.finish_reason}
    if result.token_ids is not None:
        choice |= {"prompt_token_ids": list(result.prompt_token_ids or ()), "token_ids": list(result.token_ids)}
    body = {
        "id": ("chatcmpl-" if request.is_chat else "cmpl-") + key,
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": 0,
        "model": request.model if request.model is not None else model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
            "total_tokens": result.prompt_tokens + result.completion_tokens,
        },
    }
    response = {"status_code": 200, "request_id": "req_" + key, "body": body}
    return {"id": "batch_req_" + key, "custom_id": request.custom_id, "response": response, "error": None}


def format_error(error: RowError) -> dict[str, Any]:
    """One row of errors.jsonl; `line` is the row's line in the input."""
    key = _key(error.custom_id if error.custom_id is not None else f"\0line {error.line}")
    reason = {"code": error.code, "message": error.message, "line": error.line}
    return {"id": "batch_req_" + key, "custom_id": error.custom_id, "response": None, "error": reason}


def _key(custom_id: str) -> str:
    return hashlib.blake2b(custom_id.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Tally:
    """Rows of the input: in all, with a result, with an error. `lacking`: rows that are not in results.jsonl
    or errors.jsonl exactly once."""

    total: int
    completed: int
    failed: int
    lacking: int

    @property
    def complete(self) -> bool:
        return not self.lacking

    @property
    def counts(self) -> dict[str, int]:
        return {"total": self.total, "completed": self.completed, "failed": self.failed}


@dataclass(frozen=True)
class InputRows:
    """What is kept of a checked input: its hash, and each row's key in the output: its custom_id, or its line if it has
    none."""

    sha256: str
    keys: tuple[Key, ...]

    @classmethod
    def from_file(cls, file: RequestFile) -> InputRows:
        bad = (error.line if error.custom_id is None else error.custom_id for error in file.errors)
        return cls(file.sha256, (*(request.custom_id for request in file.requests), *bad))

    def count(self, folder: Path) -> Tally:
        """Reads both files of a folder. A torn last row of results.jsonl is cut off. `UserError`: a file holds
        something else, or a running batch is writing it."""
        results, errors = read_finished(folder), read_error_keys(folder / ERRORS_NAME)
        completed = failed = lacking = 0
        for key in self.keys:
            completed += key in results
            failed += errors[key] > 0 and key not in results
            lacking += errors[key] + (key in results) != 1
        return Tally(len(self.keys), completed, failed, lacking)
