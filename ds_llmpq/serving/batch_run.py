"""Runs a batch file: plans if needed, starts DeepSpeed on the plan's hosts, supervises it, and sums up. With the folder
of an earlier run, it resumes that run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ds_llmpq import validation
from ds_llmpq.batch.reader import read_requests, refuse_unservable
from ds_llmpq.batch.results import InputRows, Tally, check_folder, read_finished
from ds_llmpq.cluster.config import DETECTED
from ds_llmpq.cluster.hostfile import find_hostfile_disagreements, parse_hostfile, write_hostfile
from ds_llmpq.errors import UserError
from ds_llmpq.files import make_absolute, read_json, write_json
from ds_llmpq.launch.config import validate_supervision
from ds_llmpq.launch.environment import check_environment
from ds_llmpq.launch.journal import (
    FINISHED,
    JOURNAL_NAME,
    RESUMES,
    Identity,
    Journal,
    fingerprint_plan,
    flatten,
    lock_folder,
    make_paths_absolute,
    select_sampling,
)
from ds_llmpq.launch.launcher import Launch, kill_leftovers
from ds_llmpq.models.fingerprint import fingerprint, fingerprint_text
from ds_llmpq.models.notes import describe_notes, list_notes
from ds_llmpq.plan import Plan, check_model, launch_order, read_plan, write_plan
from ds_llmpq.planner.config import CostConfig, PlannerConfig, WorkloadConfig
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.serving.config import PlanningConfig, RunConfig
from ds_llmpq.serving.job import Job, validate_batch
from ds_llmpq.serving.metrics import summarize
from ds_llmpq.serving.planning import Progress, make_plan
from ds_llmpq.serving.replan import plan_without
from ds_llmpq.serving.supervisor import Supervisor
from ds_llmpq.shipped import asset

Settings = TypeVar("Settings", bound=PlanningConfig)  # with `plan`: of run and evaluate


@dataclass(frozen=True)
class Screen:
    """What a run shows while it is going on; by default nothing."""

    line: Callable[[str], None] = lambda text: None
    plan: Callable[[Plan], None] = lambda plan: None
    progress: Progress | None = None  # of the solver


@dataclass(frozen=True)
class BatchRun:
    """How a run ended. `metrics` is None if the run was finished already. `reasons` say why the pipeline was restarted,
    `restarts` times."""

    tally: Tally
    metrics: Mapping[str, Any] | None = None
    restarts: int = 0
    reasons: Sequence[str] = ()


def run_batch(settings: RunConfig, out: Path, screen: Screen = Screen()) -> BatchRun:
    """Turns settings.input into `out`/results.jsonl and errors.jsonl. `settings` has its cluster already
    (`config.load_cluster`). `UserError`: a mistake, or the run failed for good or was interrupted."""
    if not settings.input:
        raise UserError("run needs input=FILE, a batch file in JSON lines.")
    if settings.resume not in RESUMES:
        raise UserError(f"resume is {settings.resume!r} but must be one of {', '.join(RESUMES)}.")
    settings = choose_model(settings)
    validate_supervision(settings.run)
    batch = validate_batch(settings.batch)
    # what rank 0 would refuse is refused at once
    refuse_unservable(requests := read_requests(make_absolute(settings.input), batch), settings.input)
    rows = InputRows.from_file(requests)
    with lock_folder(check_folder(out)):
        kill_leftovers(out)
        return _run(replace(settings, batch=batch), out, rows, screen)


def _run(settings: RunConfig, out: Path, rows: InputRows, screen: Screen) -> BatchRun:
    tally = rows.count(out)
    journal, plan = _prepare(settings, out, rows, tally, screen)
    if plan is None:
        return BatchRun(tally)
    if journal.state == FINISHED:
        screen.line(
            f"{out} was finished, but {tally.lacking} of its {tally.total} rows are gone; serving what is missing"
        )
    elif tally.completed:
        screen.line(f"going on after {tally.completed} of {tally.total} requests, in {out}")
    _check_hostfile(settings, plan)
    plan.check_batch_invariant(settings.engine.batch_invariant)
    job = Job(
        plan=plan,
        model_path=str(find_checkpoint(settings, plan)),
        input=str(make_absolute(settings.input)),
        output=str(out),
        engine=settings.engine,
        batch=settings.batch,
        trust_remote_code=settings.model.trust_remote_code,
        supervised=True,
        input_sha256=rows.sha256,
        hang_seconds=settings.run.hang_seconds,
        template_time=journal.template_time,
    )
    for note in describe_notes(job.model_path):
        screen.line(note)
    screen.plan(plan)
    supervisor = Supervisor(
        job,
        Launch.from_plan(plan, out, settings.engine.master_port),
        settings.run,
        journal,
        lambda: rows.count(out),
        lambda lost: _replan(settings, out, supervisor, lost, screen),
    )
    return _sum_up(supervisor, supervisor.run(), out, tally.completed)


def _prepare(
    settings: RunConfig, out: Path, rows: InputRows, tally: Tally, screen: Screen
) -> tuple[Journal, Plan | None]:
    """The folder's journal and plan: those of the run to resume, after a check, or new ones. No plan if the run is
    finished and its files are complete."""
    given = None if settings.plan is None else _read_launchable(settings, make_absolute(settings.plan))
    asked = Identity(rows.sha256, None, None, select_sampling(settings.batch), _list_plan_inputs(settings, given))
    journal = None if settings.resume == "force" else Journal.read(out)
    if journal is not None:
        journal.check(asked, out)
        if journal.state == FINISHED and tally.complete:
            return journal, None
    elif settings.resume != "force" and (results := len(read_finished(out))):  # of whatever input
        raise UserError(
            f"{out} already holds {results} results, but no {JOURNAL_NAME} that says of what; give another out=DIR, or "
            "resume=force to keep them and continue."
        )
    if journal is not None and (out / "plan.json").exists():
        plan = _read_launchable(settings, out / "plan.json")
        write_hostfile(out / "hostfile", launch_order(plan))
    else:  # if a run's plan is gone, the same settings make it again, or the check below says what differs
        plan = _adopt(settings, given, out) if given else make_plan(settings, out, screen.progress)
    checkpoint = find_checkpoint(settings, plan)
    asked = replace(
        asked, model=fingerprint(checkpoint), texts=fingerprint_text(checkpoint), plan=fingerprint_plan(plan)
    )
    if journal is None:
        journal = Journal(asked)
    journal.check(asked, out)
    return journal, plan


def _list_plan_inputs(settings: RunConfig, given: Plan | None) -> dict[str, Any]:
    """What determines the plan, by dotted keys: the given plan, or everything that one is made from."""
    if given is not None:
        return make_paths_absolute({"plan": fingerprint_plan(given), "quantized": settings.quantized})
    groups = {name: asdict(getattr(settings, name)) for name in ("model", "workload", "quant", "planner")}
    # a detected cluster has another amount of free memory every time
    cluster = {"name": DETECTED} if settings.cluster.name == DETECTED else asdict(settings.cluster)
    groups |= {"cluster": cluster, "engine": {"dtype": settings.engine.dtype}}
    settings_of = make_paths_absolute(flatten("", groups) | {"quantized": settings.quantized})
    # variables do not change results, and may be private; nor does it matter when layers are timed
    return {
        name: value
        for name, value in settings_of.items()
        if not name.startswith("cluster.env") and name != "planner.calibrate"
    }


def _replan(
    settings: RunConfig, out: Path, supervisor: Supervisor, lost: list[str], screen: Screen
) -> tuple[Job, Launch]:
    """The job and launch after devices were lost for good. The journal then names the new plan."""
    before = supervisor.job.plan
    plan = plan_without(settings, before, lost, out, settings.quantized is None, screen.progress)
    screen.plan(plan)
    identity = replace(supervisor.journal.identity, plan=fingerprint_plan(plan))
    supervisor.journal = replace(supervisor.journal, identity=identity)
    return replace(supervisor.job, plan=plan), Launch.from_plan(plan, out, settings.engine.master_port)


def _sum_up(supervisor: Supervisor, tally: Tally, out: Path, results_before: int) -> BatchRun:
    """Marks the run as finished and sums up."""
    metrics = _build_metrics(supervisor.job.plan, tally, out)
    metrics["restarts"] = {
        "restarts": supervisor.restarts,
        "replans": supervisor.replans,
        "reasons": supervisor.reasons,
        "results_before": results_before,
        "source": "counted",
    }
    metrics["memory_warnings"] = [*supervisor.memory_warnings, *metrics["memory_warnings"]]
    write_json(out / "metrics.json", metrics)
    supervisor.journal.end_attempt("finished", tally.completed, tally.counts).write(out)
    return BatchRun(tally, metrics, supervisor.restarts, supervisor.reasons)


def _build_metrics(plan: Plan, tally: Tally, out: Path) -> dict[str, Any]:
    """What the last start measured, with the counts of the files; no measurements if it ended before it wrote them."""
    file, remedy = out / "metrics.json", "remove it and run again"
    if file.exists():
        measured = validation.validate(validation.Plain, read_json(file, "Metrics", remedy), f"Metrics {file}", remedy)
    else:
        measured = summarize(plan, {}, [], [], startup_seconds=0.0)
    return measured | {"counts": tally.counts}


def choose_model(settings: Settings) -> Settings:
    """`settings` with a model: the small shipped one if neither a plan nor a model is given."""
    if settings.plan is not None or settings.model.path is not None or settings.model.shape:
        return settings
    return replace(settings, model=replace(settings.model, path=asset("tiny-llama")))


def obtain_plan(settings: RunConfig, out: Path, progress: Progress | None = None) -> Plan:
    """The given plan, after a check, or a new one; writes it with its hostfile into `out`."""
    if settings.plan is None:
        return make_plan(settings, out, progress)
    return _adopt(settings, _read_launchable(settings, make_absolute(settings.plan)), out)


def _adopt(settings: RunConfig, plan: Plan, out: Path) -> Plan:
    """Writes the given plan and its hostfile into `out`, and names the given keys that the plan decides instead."""
    note_ignored(settings, plan)
    write_plan(out / "plan.json", plan)
    write_hostfile(out / "hostfile", launch_order(plan))
    return plan


def _read_launchable(settings: RunConfig, file: Path) -> Plan:
    """Reads a plan. `UserError`: it sets variables for the ranks that a file may not set and the user did not ask
    for."""
    plan = read_plan(file)
    check_environment((plan.deployment.env if plan.deployment else {}), settings.cluster.env, str(file))
    return plan


def find_checkpoint(settings: RunConfig, plan: Plan) -> Path:
    """The folder of the weights: quantized ones, else where the user says, else the model that the plan names."""
    given, planned = settings.quantized or settings.model.path, plan.model_path
    if given is None and planned is None:
        raise UserError("The model is known by its shape alone, enough to plan but not to run; give model.path=DIR.")
    path = make_absolute(given or planned)
    check_model(plan, path)
    list_notes(path)  # what ranks would refuse is refused here
    return path


def _check_hostfile(settings: RunConfig, plan: Plan) -> None:
    """Checks that the user's hostfile has the plan's devices. The launcher gets the one written from the plan, because
    ranks follow the order of its hosts."""
    if settings.hostfile is None:
        return
    hostfile = make_absolute(settings.hostfile)
    wrong = find_hostfile_disagreements(parse_hostfile(hostfile), launch_order(plan))
    if wrong:
        raise UserError(f"Hostfile {hostfile} disagrees with the plan: {wrong[0]}; plan again or change the file.")


def note_ignored(settings: RunConfig, plan: Plan) -> None:
    """Names, in one line on stderr, the given keys that have no effect because `plan=FILE` decides."""
    if names := find_ignored(settings, plan):
        print(f"note: {settings.plan} decides, and so these have no effect: {', '.join(names)}.", file=sys.stderr)


def find_ignored(settings: RunConfig, plan: Plan) -> list[str]:
    """Dotted keys whose values are neither the defaults nor the plan's. The keys of the planner and the cost model do
    count in a run that may plan again (`run.on_loss=replan`)."""
    owned: list[tuple[str, Any, dict[str, Any]]] = [
        ("quant", QuantConfig(), asdict(plan.quant.to_config()) if plan.quant else {}),
        ("workload", WorkloadConfig(), asdict(plan.workload)),
    ]
    if getattr(settings.run, "on_loss", "stop") != "replan":
        owned += [("planner", PlannerConfig(), {}), ("cost", CostConfig(), {})]
    return [
        f"{group}.{name}"
        for group, defaults, planned in owned
        for name, default in asdict(defaults).items()
        if (value := asdict(getattr(settings, group))[name]) != default and value != planned.get(name, default)
    ]
