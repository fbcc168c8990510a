"""A valid row of a batch file, and the error for a row that cannot be served."""

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

    Only these fields of the body are kept, so that a million rows fit in memory.
    """

    index: int
    line: int
    custom_id: str
    url: str
    model: str | None  # from the row; copied to the result, otherwise ignored
    prompt: Prompt
    params: SamplingParams
    arrival_seconds: float = 0.0  # used only with batch.replay=trace
    return_token_ids: bool = False  # in the result, beside the text

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT_URL


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that gets an error instead of a result. `line` counts from 1; `custom_id` is None if unreadable."""

    line: int
    custom_id: str | None
    code: str
    message: str


class RequestError(Exception):
    """This request cannot be served. Becomes a RowError and never ends the batch."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message

    def row(self, line: int, custom_id: str | None) -> RowError:
        return RowError(line, custom_id, self.code, self.message)


def derive_seed(batch_seed: int, custom_id: str) -> int:
    """A seed in [0, 2**63) for a request that gives none: a hash, so that it does not depend on the row's position."""
    digest = hashlib.blake2b(f"{batch_seed}\0{custom_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
