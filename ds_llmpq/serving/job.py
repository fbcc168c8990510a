"""What every rank is told: the plan, where the model and the files are, and how requests are read.

The launcher carries it on the command line. Over several hosts that line passes a shell, so a job travels as one
token of letters, digits, `-`, `_` and `=`; nothing a configuration holds is ever read by a shell.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, get_type_hints

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import parse_json
from ds_llmpq.plan import Plan
from ds_llmpq.validation import validate

T = TypeVar("T")
_MOST_BYTES = 64 << 20
_PLAIN = (
    "model_path", "input", "output", "trust_remote_code", "supervised", "input_sha256", "hang_seconds",
    "memory_wait_seconds", "template_time",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Paths are absolute. `input` and `output` lie on the first host, `model_path` on every host."""

    plan: Plan
    model_path: str
    input: str
    output: str
    engine: EngineConfig
    batch: BatchConfig
    trust_remote_code: bool = False
    # progress as lines for a parent process instead of a bar
    supervised: bool = False
    # what `run` has read: rank 0 refuses an input that changed since
    input_sha256: str | None = None
    # a rank in which nothing moves for so long writes its stacks to the log
    hang_seconds: float | None = None
    # so long memory that the plan needs may become free: those who held it may just have died
    memory_wait_seconds: float = 0.0
    # what chat templates are told of the date (ISO, local time): the same in all attempts; None: when serving begins
    template_time: str | None = None

    def to_token(self) -> str:
        fields = {name: getattr(self, name) for name in _PLAIN} | {"plan": self.plan.to_json()}
        fields |= {"engine": asdict(self.engine), "batch": asdict(self.batch)}
        return to_token(fields)

    @classmethod
    def from_token(cls, token: str) -> Job:
        """`UserError` for what `to_token` has not made."""
        return from_token(cls, token, "start serve through `ds-llmpq run`")


def to_token(fields: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(fields).encode(), 9)).decode()


def from_token(kind: type[T], token: str, remedy: str) -> T:
    """The dataclass `kind`, one of whose fields is a plan, from the fields that `to_token` packed. `UserError`: no
    token, or one without a field, with an unknown one, or with a value that cannot be."""
    where = "The job token"
    try:
        data = zlib.decompressobj().decompress(base64.urlsafe_b64decode(token), _MOST_BYTES)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}); {remedy}.") from None
    fields = parse_json(data, where, remedy, infinity=True)
    types = get_type_hints(kind)
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise UserError(f"{where} holds {quote(fields)}, but must hold the keys {', '.join(types)}; {remedy}.")
    values = {
        name: Plan.from_json(value) if types[name] is Plan else validate(types[name], value, f"{where}: {name}", remedy)
        for name, value in fields.items()
    }
    return kind(**values)


def check_input(job: Job, sha256: str) -> None:
    """`UserError` if the input is no longer what `run` read: results of two inputs must not mix."""
    if job.input_sha256 is not None and sha256 != job.input_sha256:
        raise UserError(f"{job.input} changed while its results were being made; give the same input again.")
