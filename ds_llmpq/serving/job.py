"""What every rank is told: the plan, where the model and the files are, and what is wanted: answers or scores.

The launcher carries it on the command line. Over several hosts that line passes a shell, so a job travels as one
token of letters, digits, `-`, `_` and `=`; nothing a configuration holds is ever read by a shell.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass, field, replace
from typing import get_type_hints

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError, quote
from ds_llmpq.evaluation.config import ScoringTask
from ds_llmpq.files import parse_json
from ds_llmpq.plan import Plan
from ds_llmpq.validation import validate

_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """Paths are absolute. `input` and `output` lie on the first host, `model_path` on every host. With `scoring` the
    ranks score given tokens instead of answering the input's requests."""

    plan: Plan
    model_path: str
    input: str | None
    output: str
    engine: EngineConfig
    batch: BatchConfig = field(default_factory=BatchConfig)
    scoring: ScoringTask | None = None
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
        return pack_token(asdict(replace(self, plan=None)) | {"plan": self.plan.to_json()})

    @classmethod
    def from_token(cls, token: str) -> Job:
        """`UserError`: not a token of `to_token`, or one without a field, with an unknown one, or with a value that
        cannot be."""
        where, remedy = "The job token", "start it through `ds-llmpq run` or `ds-llmpq evaluate`"
        try:
            data = zlib.decompressobj().decompress(base64.urlsafe_b64decode(token), _MOST_BYTES)
        except (binascii.Error, zlib.error, ValueError) as error:
            raise UserError(f"{where} cannot be read ({error}); {remedy}.") from None
        fields = parse_json(data, where, remedy, infinity=True)
        types = get_type_hints(cls)
        if not isinstance(fields, dict) or set(fields) != set(types):
            raise UserError(f"{where} holds {quote(fields)}, but must hold the keys {', '.join(types)}; {remedy}.")
        plan = Plan.from_json(fields.pop("plan"))
        return cls(plan, **{name: validate(types[name], fields[name], f"{where}: {name}", remedy) for name in fields})


def pack_token(fields: object) -> str:
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(fields).encode(), 9)).decode()


def check_input(job: Job, sha256: str) -> None:
    """`UserError` if the input is no longer what `run` read: results of two inputs must not mix."""
    if job.input_sha256 is not None and sha256 != job.input_sha256:
        raise UserError(f"{job.input} changed while its results were being made; give the same input again.")
