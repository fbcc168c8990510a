"""A job: what every rank needs to know. The plan, where the model and the files are, and whether to answer or to score.

The launcher passes it on the command line. With several hosts, a shell reads that line, so a job is one token of
letters, digits, `-`, `_` and `=`; a shell never reads a value of the configuration.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError, quote
from ds_llmpq.evaluation.config import ScoringTask
from ds_llmpq.files import make_absolute, parse_json
from ds_llmpq.lengths.predictor import load_predictor
from ds_llmpq.plan import Plan, read_plan
from ds_llmpq.scheduler.policies import POLICIES
from ds_llmpq.scheduler.policies import PREDICTING as REPLAYED_BY_PREDICTION
from ds_llmpq.serving.config import ServeConfig
from ds_llmpq.validation import validate

ORDERINGS = ("arrival", "prompt_length", "predicted_length", "bucketed")
PREDICTING = frozenset({"predicted_length", "bucketed"})
ADMISSIONS = ("worst_case", "q95", "q90")
REPLAYS = (None, "trace")
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
    # show progress as lines for a parent process instead of as a bar
    supervised: bool = False
    # of the input that `run` has read: rank 0 refuses one that has changed since
    input_sha256: str | None = None
    # a rank without progress for so long writes its stacks to the log
    hang_seconds: float | None = None
    # how long to wait for memory that the plan needs: processes that held it may just have died
    memory_wait_seconds: float = 0.0
    # the date that chat templates see (ISO, local time), the same in all attempts; None: when serving begins
    template_time: str | None = None

    @classmethod
    def from_config(cls, settings: ServeConfig) -> Job:
        """The job of a rank that is started by hand. `UserError`: files or keys are missing or not usable."""
        for name in ("plan", "input", "output"):
            if not getattr(settings, name):
                raise UserError(f"serve needs {name}=...; give plan=FILE input=FILE output=DIR.")
        plan = read_plan(settings.plan)
        model_path = settings.quantized or settings.model.path or plan.model_path
        if not model_path:
            raise UserError(f"{settings.plan} names no model; give model.path=DIR.")
        return cls(
            plan=plan,
            model_path=str(make_absolute(model_path)),
            input=str(make_absolute(settings.input)),
            output=str(make_absolute(settings.output)),
            engine=settings.engine,
            batch=validate_batch(settings.batch),
            trust_remote_code=settings.model.trust_remote_code,
        )

    def to_token(self) -> str:
        return pack_token(asdict(replace(self, plan=None)) | {"plan": self.plan.to_json()})

    @classmethod
    def from_token(cls, token: str) -> Job:
        """`UserError`: not a token of `to_token`, or one with a missing or unknown field or an invalid value."""
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


def validate_batch(batch: BatchConfig) -> BatchConfig:
    """`batch` with an order, and with the absolute path of its predictor. `UserError`: no such order, admission or
    policy, or a predictor that is missing or of no use."""
    if batch.order is None:
        batch = replace(batch, order="arrival" if batch.replay else "predicted_length")
    for name, known in (("order", ORDERINGS), ("admission", ADMISSIONS), ("policy", POLICIES)):
        if getattr(batch, name) not in known:
            raise UserError(f"batch.{name} is {getattr(batch, name)!r} but must be one of {', '.join(known)}.")
    if batch.replay not in REPLAYS:
        raise UserError(f"batch.replay is {batch.replay!r} but must be trace, or null for none.")
    predicted = batch.admission != "worst_case"
    if batch.replay:
        if batch.order != "arrival":
            raise UserError(f"batch.order={batch.order} is of no use in a replay; give batch.policy instead.")
        if predicted:
            raise UserError(
                f"batch.admission={batch.admission} is of no use in a replay, which reserves each answer's own limit; "
                "leave it at worst_case."
            )
        needs = batch.policy in REPLAYED_BY_PREDICTION
    else:
        needs = predicted or batch.order in PREDICTING
    if batch.predictor is None:
        if predicted or (batch.replay and needs):
            name = f"admission={batch.admission}" if predicted else f"policy={batch.policy}"
            raise UserError(f"batch.{name} needs batch.predictor=FOLDER; train one with `ds-llmpq lengths train`.")
        return batch
    if not needs:
        raise UserError(
            f"batch.predictor is of no use with batch.order={batch.order}; give predicted_length or bucketed, or an "
            "admission or a policy that predicts."
        )
    folder = Path(batch.predictor).expanduser().absolute()
    predictor = load_predictor(folder)
    if predicted and int(batch.admission[1:]) / 100 not in predictor.task.quantiles:
        raise UserError(
            f"batch.admission={batch.admission}, but the predictor in {folder} has bounds for "
            f"{', '.join(f'{level:g}' for level in predictor.task.quantiles) or 'no quantile'}; train it with that one."
        )
    return replace(batch, predictor=str(folder))
