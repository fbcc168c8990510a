"""`profile`: times the parts of a model on this host's device types, for `plan planner.profile=DIR`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.commands.config import ProfileConfig
from ds_llmpq.cost.fit import fit_profile
from ds_llmpq.cost.fitted import profiled_kernel
from ds_llmpq.cost.profile import current_setup, read_profile
from ds_llmpq.errors import UserError
from ds_llmpq.launch.environment import choose_accelerator
from ds_llmpq.launch.progress import ProgressBar
from ds_llmpq.models.shape import read_shape
from ds_llmpq.planner.build import check_workload, micro_batches, usable_bits
from ds_llmpq.profiling.points import ProfilingTask
from ds_llmpq.quant.kernels.registry import AUTO, find_kernel
from ds_llmpq.quant.packing import check_lm_head, make_groups
from ds_llmpq.report.fidelity import format_kernels, format_profile
from ds_llmpq.serving.workload import size_workload
from ds_llmpq.validation import check_least
from ds_llmpq.wording import quote_argument


def run(settings: ProfileConfig, out: Path) -> int:
    if settings.model.path is None:
        raise UserError("profile times real layers and needs a checkpoint; set model.path=DIR.")
    out.mkdir(parents=True, exist_ok=True)
    cluster = Cluster.from_config(config.choose_cluster(settings))
    choose_accelerator(cluster.devices[0].type.kind)
    from ds_llmpq.profiling.kernel_choice import settle_kernel
    from ds_llmpq.profiling.profiler import profile

    task = _build_task(settings, cluster)
    going_on = settings.quant.kernel == AUTO and (out / "profile.csv").is_file() and not settings.force
    kept = profiled_kernel(out) if going_on else None
    quant, note = settle_kernel(task, cluster, kept, settings.engine.batch_invariant)
    if "kernel_times" in note:
        print(format_kernels(note))
    setup = current_setup(task.shape, task.dtype, find_kernel(quant.kernel), make_groups(quant), quant.lm_head_bits)
    with closing(ProgressBar()) as bar:
        profile(replace(task, quant=quant, setup=setup, kernel_note=note), cluster, out, settings.force, bar.show)
    model = fit_profile(read_profile(out / "profile.csv"), task.shape)
    model.write(out / "latency.json")
    print(format_profile(model))
    print(f"profile: {out / 'profile.csv'} (use it with {quote_argument('planner.profile', out)})")
    return 0


def _build_task(settings: ProfileConfig, cluster: Cluster) -> ProfilingTask:
    check_least("profiling", settings.profiling, seconds=0, rounds=1, chained_layers=1)
    path, engine = str(config.make_absolute(settings.model.path)), settings.engine
    shape, given = read_shape(path), config.absolute_or_none(settings.input)
    workload = size_workload(
        settings.workload, settings.model, given, settings.batch, shape, engine.refill, engine.shares_prefix
    )
    check_workload(workload, shape)
    dtype = choose_dtype(cluster, engine.dtype)
    bits, _ = usable_bits(shape, settings.quant)
    check_lm_head(shape.vocab, shape.embed_dim, settings.quant)
    sizes = {
        phase: micro_batches(phase, getattr(settings.planner.micro_batches, phase), workload.sequences)
        for phase in ("prefill", "decode")
    }
    kinds = {device.type.kind for device in cluster.devices}
    captured = "cuda" in kinds and engine.captures(kinds)
    return ProfilingTask(
        path, shape, workload, settings.quant, dtype, tuple(bits), sizes, None, captured, settings.profiling
    )
