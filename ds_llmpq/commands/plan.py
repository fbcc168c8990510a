"""`plan`: from cluster, model and workload to plan.json, problem.json and a hostfile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.batch.request_validation import check_defaults
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.gates import common_dtype
from ds_llmpq.cluster.hostfile import write_hostfile
from ds_llmpq.commands.config import PlanConfig
from ds_llmpq.cost.fitted import profiled_kernel
from ds_llmpq.errors import UserError, printable
from ds_llmpq.files import read_json, write_json
from ds_llmpq.launch.launcher import Launch, by_hand, write_environment
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.notes import list_notes
from ds_llmpq.models.prequantized import refuse_foreign
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.plan import Plan, launch_order, read_assignment, write_plan
from ds_llmpq.planner import Problem, check_plan, pareto
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.config import PlannerConfig
from ds_llmpq.planner.costsource import source_of_costs
from ds_llmpq.planner.deploy import deploy
from ds_llmpq.planner.simulation import play
from ds_llmpq.planner.variants import solve_variant
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels import resolved
from ds_llmpq.quant.packing import check_output_matrix
from ds_llmpq.report import sweep
from ds_llmpq.report.plan_table import plan_table
from ds_llmpq.report.solver_progress import progress_line
from ds_llmpq.sensitivity.omega import read_omega
from ds_llmpq.serving.workload import sized_workload


def run(settings: PlanConfig, out: Path) -> int:
    settings = config.load_cluster(settings)
    if settings.planner.mode == "pareto":
        return _front(settings, out)
    plan = make_plan(settings, out)
    if plan.model and plan.model.get("path") is not None:
        print_notes(plan.model["path"])
    print(plan_table(plan))
    print(f"plan: {out / 'plan.json'}")
    if plan.engine is not None:
        print("by hand: " + launch_line(plan, out))
    return 0


def make_plan(settings: PlanConfig, out: Path) -> Plan:
    """Plans, or checks the plan that is given, and writes the artefacts into `out`."""
    check_defaults(settings.batch)
    problem, deploy = _problem(settings)
    write_json(out / "problem.json", problem.to_json())
    if settings.check:
        solved = check_plan(problem, read_assignment(config.absolute(settings.check)))
    else:
        planner = settings.planner
        solved = solve_variant(
            problem, planner.variant, planner.group_layers, progress=progress_line(), **_options(planner)
        )  # fmt: skip
    plan = deploy(solved)
    _write_plan(plan, out)
    if (played := play(problem, solved.assignment())) is not None:
        events = {"traceEvents": played.chrome_events(), "displayTimeUnit": "ms"}
        write_json(out / "predicted_trace.json", events)  # to lay beside a run's trace.json
    return plan


def _problem(settings: PlanConfig) -> tuple[Problem, Callable[[Plan], Plan]]:
    """The problem to solve, and what makes its plan ready to launch. A problem.json from anywhere needs no model and no
    cluster, and its plan names none."""
    if settings.problem:
        return Problem.from_json(
            read_json(config.absolute(settings.problem), "Problem", "give a problem.json", infinity=True)
        ), lambda plan: plan
    planner = settings.planner
    shape, model = _model(settings.model)
    check_output_matrix(shape.vocab, shape.embed_dim, settings.quant)
    cluster = Cluster.from_config(config.cluster_of(settings))
    workload = sized_workload(
        settings.workload, settings.model, config.given(settings.input), settings.batch, shape, settings.engine.refill
    )
    omega = read_omega(planner.omega) if planner.omega else None
    if omega is not None:
        omega.check_model(shape.layers, model["fingerprint"])
    dtype, quant = settings.engine.dtype, _with_kernel(settings, cluster, shape)
    costs_of, cluster, kernel = source_of_costs(settings.cost, planner, quant, cluster, shape, dtype, quant.kernel)
    prepared = prepare(cluster, shape, workload, quant, planner, omega, dtype, kernel, costs_of)
    return prepared.problem, lambda plan: deploy(plan, cluster, prepared, model, quant, kernel)


def _with_kernel(settings: PlanConfig, cluster: Cluster, shape: ModelShape) -> QuantConfig:
    """The HQQ settings with the kernel that ranks will run: the one asked for, a profile's, or what is installed."""
    kinds = sorted({device_type.kind for device_type in cluster.device_types.values()})
    dtype = common_dtype(cluster, settings.engine.dtype)
    measured = profiled_kernel(settings.planner.profile) if settings.planner.profile else None
    return resolved(
        settings.quant, kinds, dtype, shape.linears, measured, shape.architecture, settings.engine.batch_invariant
    )


def _front(settings: PlanConfig, out: Path) -> int:
    """The Pareto front: a folder a plan, a summary and a picture, as a sweep leaves them."""
    problem, deploy = _problem(settings)
    write_json(out / "problem.json", problem.to_json())
    options = _options(settings.planner)
    del options["formula"]
    points = []
    for index, plan in enumerate(pareto(problem, **options)):
        folder = out / f"plan{index}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_plan(deploy(plan), folder)
        points.append(sweep.point_of(folder))
    sweep.write_summary(out, points)
    print(sweep.summary_table(points))
    print(f"front: {out / 'summary.csv'}")
    return 0


def _options(planner: PlannerConfig) -> dict[str, Any]:
    return {
        "time_limit_seconds": planner.time_limit_seconds,
        "gap": planner.gap,
        "solver": planner.solver,
        "seed": planner.seed,
        "formula": planner.objective,
        "pins": planner.pins or None,
    }


def _write_plan(plan: Plan, out: Path) -> None:
    write_plan(out / "plan.json", plan)
    if plan.engine is not None:
        write_hostfile(out / "hostfile", launch_order(plan))


def print_notes(path: str | Path) -> None:
    """What is to be said of the checkpoint that will serve."""
    for note in list_notes(path):
        print(f"model: {printable(note, keep='')}")


def launch_line(plan: Plan, out: Path) -> str:
    """A shell's line that starts this plan; `run` does the same and watches over it. Writes the hosts' variables."""
    launch = Launch.of_plan(plan, out)
    write_environment(launch)
    return by_hand(launch, [f"plan={out / 'plan.json'}", "input=FILE", "output=DIR"])


def _model(model: ModelConfig) -> tuple[ModelShape, dict[str, str | None]]:
    if model.path is not None:
        path = config.absolute(model.path)
        refuse_foreign(path)
        shape = read_shape(path)
        list_notes(path)  # what ranks would refuse is refused here
        return shape, {"path": str(path), "architecture": shape.architecture, "fingerprint": fingerprint(path)}
    if not model.shape:
        raise UserError("No model is given; set model.path=DIR, or model=NAME of a shipped shape to plan only.")
    shape = ModelShape.from_config(model.shape)
    return shape, {"path": None, "architecture": shape.architecture, "fingerprint": shape.fingerprint}
