"""plan.json on disk, and a solved plan made ready to launch: hosts, ranks, device kinds, threads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.hostfile import include_string, launch_ranks
from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.prequantized import refuse_foreign
from ds_llmpq.planner import reading
from ds_llmpq.planner.build import Prepared
from ds_llmpq.planner.objective import Assignment, Stage, link_seconds
from ds_llmpq.planner.plan import Plan
from ds_llmpq.quant.config import QuantConfig

_MOST_LAYERS = 10_000


def read_plan(path: str | Path) -> Plan:
    """`UserError` for a file that is missing, too large, not JSON or not a plan."""
    return Plan.from_json(_read(path))


def _read(path: str | Path) -> Any:
    return read_json(path, "Plan", "make one with `ds-llmpq plan`", infinity=True)


def read_assignment(path: str | Path) -> Plan | Assignment:
    """A plan made by hand: a whole plan.json, or only its decisions,
    `{"stages": [{"device": "host:0", "layers": [0, 5], "bits": 4}, ...], "micro_batch": {"prefill": 2, "decode": 8}}`
    with one width for all of a stage's layers or a list of one each. `UserError` for anything else."""
    obj = _read(path)
    if isinstance(obj, dict) and "schema" in obj:
        return Plan.from_json(obj)
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
        stages.append(Stage(reading.text(entry["device"], f"{where}.device"), first, last, bits))
    prefill, decode = (reading.integer(sizes[phase], f"plan.micro_batch.{phase}") for phase in ("prefill", "decode"))
    return Assignment(tuple(stages), prefill, decode)


def write_plan(path: str | Path, plan: Plan) -> None:
    Path(path).write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")


def placements(plan: Plan) -> list[tuple[str, int]]:
    """(host, slot) of each stage, in pipeline order."""
    if plan.engine is None:
        raise UserError("The plan names no hosts; plan with cluster=... instead of problem=...")
    slots = (entry["slot"] for entry in plan.engine["stages"])
    return [(str(stage.host), slot) for stage, slot in zip(plan.stages, slots, strict=True)]


def deployed(
    plan: Plan, cluster: Cluster, prepared: Prepared, model: Mapping[str, Any], quant: QuantConfig, kernel: str
) -> Plan:
    """A solved plan with what launching needs. Hosts are launched in the cluster's order, the user's own host first,
    so a stage's rank is its device's place in that order and not its place in the pipeline."""
    devices = [cluster.device(stage.device) for stage in plan.stages]
    kinds = sorted({device.type.kind for device in devices})
    if len(kinds) > 1:
        raise UserError(
            f"The plan mixes {' and '.join(kinds)} devices, which have no communicator in common; leave one kind "
            "out of the cluster."
        )
    order = {device.name: index for index, device in enumerate(cluster.devices)}
    where = [(device.host, device.slot) for device in devices]
    by_rank = sorted(where, key=lambda place: order[f"{place[0]}:{place[1]}"])
    ranks = dict(zip(by_rank, launch_ranks(by_rank), strict=True))
    stages = tuple(
        replace(stage, rank=ranks[place], host=device.host, kernel=kernel)
        for stage, device, place in zip(plan.stages, devices, where, strict=True)
    )
    assignment, sizes = plan.assignment(), plan.micro_batch.items()
    engine = {
        "dtype": prepared.dtype,
        "stages": [
            {"kind": device.type.kind, "slot": device.slot, "threads": device.threads, "cpu_share": device.cpu_share}
            for device in devices
        ],
        "include": include_string(by_rank),
        "link_seconds": {
            phase: link_seconds(prepared.problem, assignment.stages, phase, size) for phase, size in sizes
        },
        "env": dict(cluster.env),
    }
    return replace(
        plan,
        model=dict(model),
        stages=stages,
        quant=asdict(quant),
        engine=engine,
        provenance=dict(prepared.provenance),
        explanation=(*plan.explanation, *prepared.notes),
    )


def launch_order(plan: Plan) -> list[tuple[str, int]]:
    """(host, slot) by rank: the order of the hostfile's hosts."""
    by_rank = sorted(zip(plan.stages, placements(plan), strict=True), key=lambda pair: pair[0].rank)
    return [place for _, place in by_rank]


def check_model(plan: Plan, model_path: str | Path) -> None:
    """`UserError` if the checkpoint is not the one the plan was made for, or quantized by another method."""
    refuse_foreign(model_path)
    planned = (plan.model or {}).get("fingerprint")
    try:
        found = fingerprint(model_path)
    except OSError as error:
        raise UserError(f"Model {model_path} cannot be read ({error.strerror}); give model.path=DIR.") from None
    if planned != found:
        raise UserError(
            f"The plan was made for a model with fingerprint {str(planned)[:12]}, but {model_path} has {found[:12]}; "
            "plan again for this model, or give the planned one as model.path."
        )
