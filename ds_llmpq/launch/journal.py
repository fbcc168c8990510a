"""run.json: what a folder's results were made from, and how the run went so far. It decides whether a run may resume.

What is done is recorded by the results themselves (`batch.results`). The file is replaced whole, so a crash leaves the
old one or the new one.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MaxLen
from pydantic import AfterValidator

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import lock, make_absolute, read_json, write_json
from ds_llmpq.plan import Plan
from ds_llmpq.quant.config import FORMER_NAMES
from ds_llmpq.validation import Count, Label, Many, Note, Plain, Table, one_of, validate

SCHEMA = 1
JOURNAL_NAME = "run.json"
RESUMES = ("auto", "force")
UNFINISHED, FINISHED = "unfinished", "finished"
_MOST_ATTEMPTS = 1000  # the last ones are kept
# settings that do not change results
_NO_MATTER = ("order", "predictor")
# settings that runs of former versions do not name, and what holds for those
_ADDED = {"quant.kv_bits": 16, "quant.zeros": "auto", "workload.drawn_share": None, "workload.pool_positions": None}
# settings that are files or folders
_PATHS = frozenset({"model.path", "quantized", "planner.profile", "planner.sensitivity"})


@dataclass(frozen=True)
class Identity:
    """What results depend on. `settings`: the ones that the plan was made with, by dotted keys; empty if it was
    given."""

    input: Label  # sha256 of what was read of the input file
    model: Label | None  # fingerprint of the checkpoint
    plan: Label | None  # sha256 of the plan's decisions; None before planning
    sampling: Plain
    settings: Plain = field(default_factory=dict)
    texts: Label | None = None  # of the checkpoint's tokenizer, templates and generation defaults

    def changes(self, now: Identity) -> list[str]:
        """The differences in words; fields that are missing on either side are ignored."""
        found = []
        if self.input != now.input:
            found.append(f"the input (sha256 {self.input[:12]}, now {now.input[:12]})")
        for name in ("model", "plan"):
            before, after = getattr(self, name), getattr(now, name)
            if before and after and before != after:
                found.append(f"the {name} (fingerprint {before[:12]}, now {after[:12]})")
        if self.texts and now.texts and self.texts != now.texts:
            found.append("the checkpoint's tokenizer, chat template or generation_config.json")
        found += _list_differences("batch.", self.sampling, now.sampling)
        if self.settings and now.settings:
            found += _list_differences("", _ADDED | self.settings, _ADDED | now.settings)
        return found


@dataclass(frozen=True)
class Attempt:
    """One start of the pipeline. `reason` is empty while it runs; times are in UTC."""

    started: Label
    ended: Label = ""
    reason: Note = ""
    results: Count = 0  # in the folder when it ended


def _check_time(text: str) -> str:
    datetime.datetime.fromisoformat(text)
    return text


@dataclass(frozen=True)
class Journal:
    """The record of one output folder. `state`: unfinished, or finished once every row has a result or an error.
    `template_time`: local time of the first start, which chat templates see in all later ones too. Journals of earlier
    versions lack it."""

    identity: Identity
    state: one_of(UNFINISHED, FINISHED) = UNFINISHED
    counts: Table[Count] = field(default_factory=dict)
    attempts: Many[Attempt] = ()
    template_time: Annotated[str, MaxLen(64), AfterValidator(_check_time)] = field(
        default_factory=lambda: datetime.datetime.now().isoformat(timespec="seconds")
    )
    schema: one_of(SCHEMA) = SCHEMA

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The folder's journal, None if there is none. `UserError`: damaged, or another program's run.json."""
        file = folder / JOURNAL_NAME
        if not file.exists():
            return None
        remedy = "give another out=DIR, or resume=force to begin again and keep the results"
        found = validate(cls, read_json(file, "journal", remedy), f"journal {file}", remedy)
        settings = {_present_key(key): value for key, value in found.identity.settings.items()}
        settings = make_paths_absolute(settings)  # earlier versions kept them as they were given
        return replace(found, identity=replace(found.identity, settings=settings))

    def write(self, folder: Path) -> None:
        write_json(folder / JOURNAL_NAME, asdict(replace(self, attempts=self.attempts[-_MOST_ATTEMPTS:])))

    def check(self, now: Identity, folder: Path) -> None:
        """`UserError` that names what changed since this run began."""
        if found := self.identity.changes(now):
            raise UserError(
                f"{folder} holds a run begun with other settings: {'; '.join(found[:4])}"
                f"{f' and {len(found) - 4} more' if len(found) > 4 else ''} changed; give the same ones again, another "
                "out=DIR, or resume=force to keep its results and continue with the new ones."
            )

    def begin_attempt(self) -> Journal:
        """A journal with a new running attempt."""
        return replace(self, state=UNFINISHED, attempts=(*self.attempts, Attempt(_utc_time())))

    def end_attempt(self, reason: str, results: int, counts: Mapping[str, int] | None = None) -> Journal:
        """A journal whose last attempt has ended; with `counts` the run is finished."""
        last = replace(self.attempts[-1], ended=_utc_time(), reason=reason, results=results)
        finished = {"state": FINISHED, "counts": dict(counts)} if counts is not None else {}
        return replace(self, attempts=(*self.attempts[:-1], last), **finished)


def fingerprint_plan(plan: Plan) -> str:
    """SHA-256 of what results depend on in a plan: bit widths, quantization and compute dtype. Devices and
    micro-batches affect when a row runs, but not its text, as far as the engine guarantees that."""
    decided = {
        "model": plan.model.fingerprint if plan.model else None,
        "bits": [width for stage in plan.stages for width in stage.bits],
        "quant": _rename_former(asdict(plan.quant)) if plan.quant else None,
        "dtype": plan.deployment.compute_dtype if plan.deployment else None,
    }
    return _hash(decided)


def _present_key(key: str) -> str:
    """The present name of a setting in a journal of the former version."""
    from ds_llmpq.overrides import find_present  # loads Hydra, which ranks have no use for

    return find_present(key) or key


def _rename_former(quant: dict[str, Any]) -> dict[str, Any]:
    """Settings under their former names, without those that were not there: earlier runs hashed these, and must be able
    to resume."""
    former = {now: name for name, now in FORMER_NAMES.items()}
    missing = object()
    return {
        former.get(name, name): value for name, value in quant.items() if _ADDED.get(f"quant.{name}", missing) != value
    }


def select_sampling(batch: BatchConfig) -> dict[str, Any]:
    """The defaults that rows inherit, and the limits by which rows are refused."""
    return {name: value for name, value in asdict(batch).items() if name not in _NO_MATTER}


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings by dotted keys."""
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, entry in value.items():
            found |= flatten(f"{prefix}.{key}" if prefix else str(key), entry)
        return found
    return {prefix: value}


def refuse_run_folder(folder: Path) -> None:
    """`UserError` if the folder holds a run, whose plan and other files another command would replace."""
    if (folder / JOURNAL_NAME).exists():
        raise UserError(f"{folder} holds a run, whose files would be replaced; give another out=DIR.")


def make_paths_absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` by dotted keys, so that the same files are the same in another working folder."""
    return {
        name: os.path.realpath(make_absolute(value)) if name in _PATHS and isinstance(value, str) else value
        for name, value in settings.items()
    }


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps a second `run` out of the folder, even between attempts."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock(descriptor, f"{folder} is in use by another run; wait for it or give another out=DIR.")
        yield
    finally:
        os.close(descriptor)


def _list_differences(prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    # as in JSON, without tuples and with text keys, so that both sides compare
    before, after = json.loads(json.dumps(before, default=str)), json.loads(json.dumps(after, default=str))
    missing = object()
    return [
        f"{prefix}{name} ({_abbreviate(before.get(name))}, now {_abbreviate(after.get(name))})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, missing) != after.get(name, missing)
    ]


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}"  # paths differ at their ends


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _utc_time() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
