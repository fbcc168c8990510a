"""`export`: writes a plan as arguments and configuration of another system."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.cluster.hostfile import write_hostfile
from ds_llmpq.commands.config import ExportConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import write_json
from ds_llmpq.plan import launch_order, read_plan
from ds_llmpq.planner.export import export


def run(settings: ExportConfig, out: Path) -> int:
    if not settings.plan or not settings.to:
        raise UserError("export needs plan=FILE and to=vllm, llama_cpp or deepspeed.")
    plan = read_plan(config.make_absolute(settings.plan))
    made = export(plan, settings.to)
    out.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "to": settings.to, **made.record, "commands": list(made.lines), "notes": list(made.notes)}
    write_json(file := out / f"{settings.to}.json", record)
    if settings.to == "deepspeed":
        write_json(out / "ds_config.json", made.record["ds_config"])
        write_hostfile(out / "hostfile", launch_order(plan))
    print("\n".join([*made.lines, *(f"note: {note}" for note in made.notes)]))
    print(f"export: {file}")
    return 0
