"""plan.json on disk, and plans made by hand."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.files import read_json, write_json
from ds_llmpq.plan.assignment import Assignment, StageAssignment
from ds_llmpq.plan.plan import FORMER_SCHEMA, MOST_LAYERS, REMEDY, SCHEMA, Plan
from ds_llmpq.plan.plan_parts import MicroBatches
from ds_llmpq.validation import Count, LayerBits, Name, OneOrMany, Some, validate


@dataclass(frozen=True)
class _DecidedStage:
    device: Name
    layers: tuple[Count, Count]
    bits: OneOrMany[LayerBits]


@dataclass(frozen=True)
class _Decisions:
    stages: Some[_DecidedStage]
    micro_batch: MicroBatches


def read_plan(path: str | Path) -> Plan:
    """`UserError` for a file that is missing, too large, not JSON or not a plan."""
    return _plan_from(_read(path), path)


def _plan_from(obj: Any, path: str | Path) -> Plan:
    plan = Plan.from_json(obj)
    if obj["schema"] == FORMER_SCHEMA:
        said = f"has the former schema {FORMER_SCHEMA}; the next version reads {SCHEMA} only, plan again."
        print(f"note: {make_printable(path, keep='')} {said}", file=sys.stderr)
    return plan


def _read(path: str | Path) -> Any:
    return read_json(path, "Plan", "make one with `ds-llmpq plan`", infinity=True)


def read_assignment(path: str | Path) -> Plan | Assignment:
    """A plan made by hand: a whole plan.json, or only its decisions,
    `{"stages": [{"device": "host:0", "layers": [0, 5], "bits": 4}, ...], "micro_batch": {"prefill": 2, "decode": 8}}`.
    `bits` is one width for all layers of a stage, or a list with one for each. `UserError`: anything else."""
    obj = _read(path)
    if isinstance(obj, dict) and "schema" in obj:
        return _plan_from(obj, path)
    decided = validate(_Decisions, obj, "plan", REMEDY)
    stages = []
    for index, stage in enumerate(decided.stages):
        first, last = stage.layers
        if last - first > MOST_LAYERS:
            path = f"plan.stages[{index}].layers"
            raise UserError(f"{path} has {last - first} layers, but no model has more than {MOST_LAYERS}; {REMEDY}.")
        bits = stage.bits if isinstance(stage.bits, tuple) else (stage.bits,) * max(last - first, 0)
        stages.append(StageAssignment(stage.device, first, last, bits))
    return Assignment(tuple(stages), decided.micro_batch.prefill, decided.micro_batch.decode)


def write_plan(path: str | Path, plan: Plan) -> None:
    write_json(path, plan.to_json())
