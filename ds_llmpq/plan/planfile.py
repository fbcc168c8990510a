"""plan.json on disk, and plans made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, printable
from ds_llmpq.files import read_json
from ds_llmpq.plan import reading
from ds_llmpq.plan.assignment import Assignment, StageAssignment
from ds_llmpq.plan.plan import FORMER_SCHEMA, SCHEMA, Plan

_MOST_LAYERS = 10_000


def read_plan(path: str | Path) -> Plan:
    """`UserError` for a file that is missing, too large, not JSON or not a plan."""
    return _plan_from(_read(path), path)


def _plan_from(obj: Any, path: str | Path) -> Plan:
    plan = Plan.from_json(obj)
    if obj["schema"] == FORMER_SCHEMA:
        said = f"has the former schema {FORMER_SCHEMA}; the next version reads {SCHEMA} only, plan again."
        print(f"note: {printable(path, keep='')} {said}", file=sys.stderr)
    return plan


def _read(path: str | Path) -> Any:
    return read_json(path, "Plan", "make one with `ds-llmpq plan`", infinity=True)


def read_assignment(path: str | Path) -> Plan | Assignment:
    """A plan made by hand: a whole plan.json, or only its decisions,
    `{"stages": [{"device": "host:0", "layers": [0, 5], "bits": 4}, ...], "micro_batch": {"prefill": 2, "decode": 8}}`
    with one width for all of a stage's layers or a list of one each. `UserError` for anything else."""
    obj = _read(path)
    if isinstance(obj, dict) and "schema" in obj:
        return _plan_from(obj, path)
    reading.keys(obj, "plan", ("stages", "micro_batch"))
    sizes = reading.keys(obj["micro_batch"], "plan.micro_batch", ("prefill", "decode"))
    stages = []
    for index, entry in enumerate(reading.items(obj["stages"], "plan.stages")):
        where = f"plan.stages[{index}]"
        reading.keys(entry, where, ("device", "layers", "bits"))
        span = reading.items(entry["layers"], f"{where}.layers", length=2)
        first, last = (reading.integer(value, f"{where}.layers[{i}]", low=0) for i, value in enumerate(span))
        if last - first > _MOST_LAYERS:
            raise UserError(f"{where}.layers has {last - first} layers, but no model has more than {_MOST_LAYERS}.")
        widths = entry["bits"] if isinstance(entry["bits"], list) else [entry["bits"]] * max(last - first, 0)
        bits = tuple(reading.integer(width, f"{where}.bits[{i}]") for i, width in enumerate(widths))
        stages.append(StageAssignment(reading.text(entry["device"], f"{where}.device"), first, last, bits))
    prefill, decode = (reading.integer(sizes[phase], f"plan.micro_batch.{phase}") for phase in ("prefill", "decode"))
    return Assignment(tuple(stages), prefill, decode)


def write_plan(path: str | Path, plan: Plan) -> None:
    Path(path).write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
