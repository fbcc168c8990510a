"""`plan`: from cluster, model and workload to plan.json, problem.json and a hostfile."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ds_llmpq import config
from ds_llmpq.commands.config import PlanCommandConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import write_json
from ds_llmpq.launch.launcher import Launch, format_manual_command, write_environment
from ds_llmpq.models.notes import describe_notes
from ds_llmpq.plan import Plan
from ds_llmpq.planner import pareto
from ds_llmpq.report import sweep
from ds_llmpq.report.plan_table import describe_plan, format_plan
from ds_llmpq.report.solver_progress import make_progress_callback
from ds_llmpq.research.ablations import solve_ablation
from ds_llmpq.research.published_costs import SOURCES
from ds_llmpq.serving.planning import Progress, build_problem, build_solver_options, make_plan, write_artefacts


def run(settings: PlanCommandConfig, out: Path) -> int:
    settings = config.load_cluster(settings)
    if settings.planner.mode == "pareto":
        return _front(settings, out)
    plan = _make(settings, out, make_progress_callback())
    if plan.model_path is not None:
        print("".join(f"{note}\n" for note in describe_notes(plan.model_path)), end="")
    print(format_plan(plan))
    print(f"plan: {out / 'plan.json'}")
    if plan.is_deployed:
        print("by hand: " + prepare_manual_launch(plan, out))
    return 0


def run_point(settings: PlanCommandConfig, out: Path) -> int:
    """A point of a sweep: one line; plan.json has the whole plan, and a table of all points comes at the end."""
    settings = config.load_cluster(settings)
    if settings.planner.mode == "pareto":
        return _front(settings, out)
    print(f"{out.name}: {describe_plan(_make(settings, out, lambda event: None)).splitlines()[0]}", flush=True)
    return 0


def _make(settings: PlanCommandConfig, out: Path, progress: Progress) -> Plan:
    ablation = settings.ablation
    solver = partial(
        solve_ablation, variant=ablation.variant, group_layers=ablation.group_layers, objective=ablation.objective
    )
    return make_plan(settings, out, progress, solver, SOURCES)


def _front(settings: PlanCommandConfig, out: Path) -> int:
    """The Pareto front: a folder for each plan, a summary and a picture, as a sweep leaves them."""
    for name in ("baseline", "deadline_seconds"):
        if getattr(settings.planner, name) is not None:
            raise UserError(f"planner.mode=pareto makes several plans; leave planner.{name} out.")
    problem, deploy = build_problem(settings, SOURCES)
    write_json(out / "problem.json", problem.to_json())
    options = build_solver_options(settings.planner)
    points = []
    for index, plan in enumerate(pareto(problem, **options)):
        folder = out / f"plan{index}"
        folder.mkdir(parents=True, exist_ok=True)
        write_artefacts(deploy(plan), folder)
        points.append(sweep.read_point(folder))
    sweep.write_summary(out, points)
    print(sweep.format_points(points))
    print(f"front: {out / 'summary.csv'}")
    return 0


def prepare_manual_launch(plan: Plan, out: Path) -> str:
    """Writes the hosts' variables; returns a shell line that starts this plan as `run` does, but without
    supervision."""
    launch = Launch.from_plan(plan, out)
    write_environment(launch)
    return format_manual_command(launch, [f"plan={out / 'plan.json'}", "input=FILE", "output=DIR"])
