"""A valid row of a batch file, and the error of a row that cannot be served."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

from ds_llmpq.scheduler.sampling_params import SamplingParams

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

# chat: ((role, text), ...); completions: the text, or its token ids
Prompt: TypeAlias = "str | tuple[int, ...] | tuple[tuple[str, str], ...]"


@dataclass(frozen=True, slots=True)
class Request:
    """One valid row. `index` counts rows from 0, bad ones too; `line` counts lines of the file from 1.

    The parsed body is not kept: a million rows fit in memory because only these fields remain of it.
    """

    index: int
    line: int
    custom_id: str
    url: str
    model: str | None  # as the row names it; recorded in the result, otherwise ignored
    prompt: Prompt
    params: SamplingParams
    arrival_seconds: float = 0.0  # used only with batch.replay=trace
    return_token_ids: bool = False  # in the result, beside the text

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT_URL


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that gets an error row instead of a result. `line` counts from 1; `custom_id` is None if unreadable."""

    line: int
    custom_id: str | None
    code: str
    message: str


class RequestError(Exception):
    """This request cannot be served, the others can: becomes a RowError, never ends the batch."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message

    def row(self, line: int, custom_id: str | None) -> RowError:
        return RowError(line, custom_id, self.code, self.message)


def derive_seed(batch_seed: int, custom_id: str) -> int:
    """A seed in [0, 2**63) for a request that gives none: a stable hash, so it does not depend on the row's place."""
    digest = hashlib.blake2b(f"{batch_seed}\0{custom_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
