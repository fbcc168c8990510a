"""`run`: plan if needed, start DeepSpeed on the plan's hosts, follow it, sum up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.batch.job import Job
from ds_llmpq.batch.ordering import checked
from ds_llmpq.batch.progress import ERROR_MARK, Bar, read
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.results import check_folder, read_finished
from ds_llmpq.cluster.hostfile import hostfile_disagreements, parse_hostfile, write_hostfile
from ds_llmpq.engine.launcher import LOG_NAME, Launch
from ds_llmpq.engine.launcher import run as launch
from ds_llmpq.errors import Interrupted, UserError
from ds_llmpq.planner import Plan
from ds_llmpq.planner.planfile import check_model, launch_order, read_plan, write_plan
from ds_llmpq.report.plan_table import plan_table
from ds_llmpq.report.run_summary import run_summary
from ds_llmpq.schema import RunVerb
from ds_llmpq.verbs.plan import make_plan
from ds_llmpq.verbs.serve import SOME_FAILED


def run(settings: RunVerb, out: Path) -> int:
    if not settings.input:
        raise UserError("run needs input=FILE, a batch file in JSON lines.")
    batch = checked(settings.batch)
    read_requests(config.absolute(settings.input), batch)  # what rank 0 would refuse is said at once
    check_folder(out)
    if finished := read_finished(out):
        raise UserError(f"{out} already holds {len(finished)} results; give another out=DIR.")
    plan = plan_of(settings, out)
    _check_hostfile(settings, plan)
    job = Job(
        plan=plan,
        model_path=str(checkpoint_of(settings, plan)),
        input=str(config.absolute(settings.input)),
        output=str(out),
        engine=settings.engine,
        batch=batch,
        trust_remote_code=settings.model.trust_remote_code,
        supervised=True,
    )
    print(plan_table(plan), flush=True)
    _follow(Launch.of_plan(plan, out, settings.engine.master_port), job)
    metrics = _metrics(plan, out)
    print(run_summary(metrics))
    print(f"results: {out / 'results.jsonl'}")
    if metrics["counts"]["failed"]:
        print(f"{metrics['counts']['failed']} requests failed; the reasons are in {out / 'errors.jsonl'}")
        return SOME_FAILED
    return 0


def _metrics(plan: Plan, out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / "metrics.json").read_text())
    except FileNotFoundError:
        first = launch_order(plan)[0][0]
        raise UserError(
            f"The pipeline ended well, but its files are not in {out}: rank 0 wrote them on host {first}; start run "
            "there, or give out= on a file system that both hosts share."
        ) from None


def plan_of(settings: RunVerb, out: Path) -> Plan:
    if settings.plan is None:
        return make_plan(settings, out)
    plan = read_plan(settings.plan)
    write_plan(out / "plan.json", plan)
    write_hostfile(out / "hostfile", launch_order(plan))
    return plan


def checkpoint_of(settings: RunVerb, plan: Plan) -> Path:
    """Where the weights are: quantized ones, else where the user says, else where they were planned for."""
    given, planned = settings.model.path, (plan.model or {}).get("path")
    if settings.quantized is not None:
        given = settings.quantized
    elif given == config.asset("tiny-llama"):  # model=tiny is only the default
        given = planned
    if given is None and planned is None:
        raise UserError("The model is known by its shape alone, enough to plan but not to run; give model.path=DIR.")
    path = config.absolute(given or planned)
    check_model(plan, path)
    return path


def _check_hostfile(settings: RunVerb, plan: Plan) -> None:
    """The user's hostfile only confirms that the plan's devices may be used: ranks follow the order of the hosts, so
    the launcher gets the one written from the plan."""
    if settings.hostfile is None:
        return
    hostfile = config.absolute(settings.hostfile)
    wrong = hostfile_disagreements(parse_hostfile(hostfile), launch_order(plan))
    if wrong:
        raise UserError(f"Hostfile {hostfile} disagrees with the plan: {wrong[0]}; plan again or change the file.")


def _follow(start: Launch, job: Job) -> None:
    """Runs the job under the launcher, showing its progress; `UserError` with the first mistake a rank named."""
    bar = Bar()
    mistakes: list[str] = []

    def on_line(line: str) -> None:
        if (fields := read(line)) is not None:
            bar.show(fields["phase"], fields["done"], fields["total"], fields["note"])
        elif ERROR_MARK in line:
            mistakes.append(line.partition(ERROR_MARK)[2])

    try:
        code = launch(start, ["--job", job.to_token()], on_line)
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted; what finished is kept in {job.output}.") from None
    finally:
        bar.close()
    if mistakes:
        raise UserError(mistakes[0])
    if code:
        raise UserError(
            f"The pipeline ended with exit code {code}; what finished is kept in {job.output}, and the reason is in "
            f"{start.folder / LOG_NAME}."
        )
