"""From a command's settings to a plan: the problem, its solution, and the artefacts in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request_validation import check_defaults
from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.cluster.hostfile import write_hostfile
from ds_llmpq.cost.fitted import profiled_kernel
from ds_llmpq.cost.profile import current_setup
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError
from ds_llmpq.files import absolute_or_none, make_absolute, read_json, write_json
from ds_llmpq.launch.progress import ProgressBar
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.models.description import refuse_quantized
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.notes import list_notes
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.plan import Plan, PlannedModel, check_shared_cache, launch_order, read_assignment, write_plan
from ds_llmpq.planner import Problem, ProgressEvent, check_plan, solve
from ds_llmpq.planner.build import check_workload, micro_batches, prepare, usable_bits
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.planner.cost_source import FurtherSource, select_costs
from ds_llmpq.planner.deadline import solve_by_deadline
from ds_llmpq.planner.deploy import deploy
from ds_llmpq.profiling.points import TimingTask
from ds_llmpq.profiling.short_profile import calibrate
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.registry import AUTO, explain_dequantize, find_kernel, select_kernel
from ds_llmpq.quant.packing import check_lm_head, make_groups
from ds_llmpq.sensitivity.table import read_sensitivity
from ds_llmpq.serving.config import PlanConfig, PlanningConfig
from ds_llmpq.serving.prediction import simulate_workload, sum_seconds, write_predicted_trace
from ds_llmpq.serving.workload import size_workload
from ds_llmpq.validation import check_least
from ds_llmpq.wording import pluralize

Progress = Callable[[ProgressEvent], None]


def make_plan(
    settings: PlanningConfig,
    out: Path,
    progress: Progress | None = None,
    solver: Callable[..., Plan] = solve,
    sources: Mapping[str, FurtherSource] | None = None,
) -> Plan:
    """Plans, or checks the given plan, and writes the artefacts into `out`. `settings` has its cluster already
    (`config.load_cluster`), so no `cluster_file` is read.

    solver: called like `planner.solve`. sources: further layer times, by name of `cost.source`.
    """
    options = EngineConfig(**asdict(settings.engine))  # `plan` has but some of its keys
    settings = PlanConfig.of(settings)
    check_defaults(settings.batch)
    problem, finish = build_problem(settings, sources, _CalibrationScreen() if progress else None)
    write_json(out / "problem.json", problem.to_json())
    if settings.check:
        solved = check_plan(problem, read_assignment(make_absolute(settings.check)))
    else:
        planner = settings.planner
        limits = {"progress": progress, "least_gain": planner.least_gain, **build_solver_options(planner)}
        if planner.deadline_seconds is None:
            solved = solver(problem, **limits)
        else:
            prices = None if settings.problem else Cluster.from_config(settings.cluster).sum_prices
            limits |= {"plan_for": solver, "requests": _count_requests(settings)}
            solved = solve_by_deadline(problem, planner.deadline_seconds, prices, **limits)
    plan = finish(solved)
    splits_prompts = settings.problem is not None or _read_shape(settings.model).spec.splits_prompts
    simulated = simulate_workload(plan, options, splits_prompts)
    plan = replace(plan, run_seconds=sum_seconds(simulated))
    write_artefacts(plan, out)
    if simulated:
        write_predicted_trace(plan, simulated, out)
    return plan


def build_problem(
    settings: PlanConfig,
    sources: Mapping[str, FurtherSource] | None = None,
    screen: _CalibrationScreen | None = None,
) -> tuple[Problem, Callable[[Plan], Plan]]:
    """The problem to solve, and the function that makes its plan ready to launch. A given problem.json needs no model
    and no cluster, and its plan names none."""
    if settings.problem:
        return Problem.from_json(
            read_json(make_absolute(settings.problem), "Problem", "give a problem.json", infinity=True)
        ), lambda plan: plan
    planner = settings.planner
    check_least("planner", planner, theta=0, max_quality_loss=0, max_latency_seconds=0)
    if settings.check and planner.mode == "theta":  # the user chose the bit widths of a plan made by hand
        planner = replace(planner, max_quality_loss=None)
    shape, model = _model(settings.model)
    check_lm_head(shape.vocab, shape.embed_dim, settings.quant)
    cluster = Cluster.from_config(settings.cluster)
    dtype, quant = settings.engine.dtype, _with_kernel(settings, cluster, shape)
    workload = size_workload(
        settings.workload,
        settings.model,
        absolute_or_none(settings.input),
        settings.batch,
        shape,
        settings.engine.refill,
        settings.engine.shares_prefix,
        _find_shared_block(settings, quant),
    )
    if settings.input and settings.model.path is None:
        print(
            "note: the lengths of the input are not measured, since the model is a shape without a tokenizer; planning "
            f"for {pluralize(workload.sequences, 'sequence')} of {workload.prompt_tokens} + "
            f"{workload.generated_tokens} tokens (workload.sequences, .prompt_tokens, .generated_tokens)",
            file=sys.stderr,
        )
    sensitivity = read_sensitivity(planner.sensitivity) if planner.sensitivity else None
    if sensitivity is not None:
        sensitivity.check_model(shape.layers, model.fingerprint)
    if (profile := _calibrate(settings, cluster, shape, workload, quant, screen)) is not None:
        planner = replace(planner, profile=str(profile))
    # further sources have times of other systems, which captured nothing
    captured = _captures(settings) and settings.cost.source not in (sources or {})
    make_costs, cluster, kernel = select_costs(
        settings.cost, planner, quant, cluster, shape, dtype, find_kernel(quant.kernel), sources, captured,
        workload.drawn_share or 0.0,
    )  # fmt: skip
    prepared = prepare(cluster, shape, workload, quant, planner, sensitivity, dtype, kernel, make_costs, captured)
    return prepared.problem, lambda plan: deploy(plan, cluster, prepared, model, quant, kernel)


def _count_requests(settings: PlanConfig) -> int:
    """How many rows of the input are to be served; 0 without an input."""
    return len(read_requests(make_absolute(settings.input), settings.batch).requests) if settings.input else 0


def _captures(settings: PlanConfig) -> bool:
    """Whether there are GPUs whose stages will capture their decode passes."""
    kinds = {
        settings.cluster.device_types[device.type].kind for host in settings.cluster.hosts for device in host.devices
    }
    return "cuda" in kinds and settings.engine.captures(kinds)


def _find_shared_block(settings: PlanConfig, quant: QuantConfig) -> int:
    """Positions of the cache blocks that sequences share; 0: each has positions of its own. `UserError`: a pool that
    cannot be."""
    if settings.engine.is_paged:
        check_shared_cache(True, settings.engine.batch_invariant)
        return find_kernel(quant.kernel).block_positions(paged=True)
    if settings.workload.pool_positions:
        raise UserError(
            f"workload.pool_positions={settings.workload.pool_positions} is of no use unless sequences share the KV "
            "cache; give engine.kv_cache=paged as well."
        )
    return 0


def _with_kernel(settings: PlanConfig, cluster: Cluster, shape: ModelShape) -> QuantConfig:
    """The HQQ settings with the kernel that ranks will run: the requested one, a profile's, or one that is
    installed."""
    kinds = sorted({device_type.kind for device_type in cluster.device_types.values()})
    dtype = choose_dtype(cluster, settings.engine.dtype)
    measured = profiled_kernel(settings.planner.profile) if settings.planner.profile else None
    quant = select_kernel(
        settings.quant, kinds, dtype, shape.linears, measured, shape.spec, settings.engine.batch_invariant
    )
    if settings.quant.kernel == AUTO and (reason := explain_dequantize(quant, kinds, dtype)):
        print(f"note: {reason}", file=sys.stderr)
    return quant


def _calibrate(
    settings: PlanConfig,
    cluster: Cluster,
    shape: ModelShape,
    workload: WorkloadConfig,
    quant: QuantConfig,
    screen: _CalibrationScreen | None,
) -> Path | None:
    """A short profile of these devices, if the times would otherwise come from the roofline."""
    planner, path = settings.planner, settings.model.path
    if planner.profile is not None or settings.cost.source != "auto" or path is None:
        return None
    check_workload(workload, shape)
    dtype = choose_dtype(cluster, settings.engine.dtype)
    bits, _ = usable_bits(shape, quant)
    sizes = {
        phase: micro_batches(phase, getattr(planner.micro_batches, phase), workload.sequences)
        for phase in ("prefill", "decode")
    }
    setup = current_setup(shape, dtype, find_kernel(quant.kernel), make_groups(quant), quant.lm_head_bits)
    wanted = TimingTask(
        str(make_absolute(path)), shape, workload, quant, dtype, tuple(bits), sizes, setup, _captures(settings)
    )
    if screen is None:
        return calibrate(wanted, cluster, planner.calibrate, lambda text: None)
    try:
        return calibrate(wanted, cluster, planner.calibrate, screen.say, screen.advance)
    finally:
        screen.bar.close()


class _CalibrationScreen:
    """Sentences on what is measured, and how far that is, on standard error."""

    def __init__(self) -> None:
        self.bar = ProgressBar()

    def say(self, text: str) -> None:
        self.bar.close()
        print(f"calibration: {text}", file=sys.stderr)

    def advance(self, done: int, total: int) -> None:
        self.bar.show("calibration", done, total)


def build_solver_options(planner: PlannerConfig) -> dict[str, Any]:
    return {
        "time_limit_seconds": planner.time_limit_seconds,
        "gap": planner.gap,
        "solver": planner.solver,
        "seed": planner.seed,
        "pins": planner.pins or None,
        "baseline": planner.baseline,
    }


def write_artefacts(plan: Plan, out: Path) -> None:
    write_plan(out / "plan.json", plan)
    if plan.is_deployed:
        write_hostfile(out / "hostfile", launch_order(plan))


def _model(model: ModelConfig) -> tuple[ModelShape, PlannedModel]:
    if model.path is not None:
        path = make_absolute(model.path)
        refuse_quantized(path)
        list_notes(path)  # what ranks would refuse is refused here
        shape = _read_shape(model)
        return shape, PlannedModel(str(path), shape.architecture, fingerprint(path))
    shape = _read_shape(model)
    return shape, PlannedModel(None, shape.architecture, shape.fingerprint)


def _read_shape(model: ModelConfig) -> ModelShape:
    if model.path is not None:
        return read_shape(make_absolute(model.path))
    if not model.shape:
        raise UserError("No model is given; set model.path=DIR, or model=NAME of a shipped shape to plan only.")
    return ModelShape.from_config(model.shape)
