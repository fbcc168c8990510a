"""`profile`: the parts of a model timed on this host's device types, for `plan planner.profile=DIR`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.commands.config import ProfileConfig
from ds_llmpq.cost.fit import LatencyModel, fit_profile
from ds_llmpq.cost.fitted import profiled_kernel
from ds_llmpq.cost.profile import current_setup, read_profile
from ds_llmpq.errors import UserError
from ds_llmpq.launch.progress import ProgressBar
from ds_llmpq.models.shape import read_shape
from ds_llmpq.planner.build import check_workload, micro_batches, usable_bits
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.registry import AUTO, find_kernel, select_kernel
from ds_llmpq.quant.packing import check_lm_head, groups_of
from ds_llmpq.report.fidelity import profile_table
from ds_llmpq.serving.workload import size_workload


def run(settings: ProfileConfig, out: Path) -> int:
    if settings.model.path is None:
        raise UserError("profile times real layers and needs a checkpoint; set model.path=DIR.")
    out.mkdir(parents=True, exist_ok=True)
    cluster = Cluster.from_config(config.cluster_of(settings))
    # before anything imports deepspeed, which looks for an accelerator when it is imported
    os.environ.setdefault("DS_ACCELERATOR", cluster.devices[0].type.kind)
    from ds_llmpq.profiling.profiler import Task, profile

    path = str(config.make_absolute(settings.model.path))
    shape = read_shape(path)
    workload = size_workload(
        settings.workload,
        settings.model,
        config.absolute_or_none(settings.input),
        settings.batch,
        shape,
        settings.engine.refill,
    )
    check_workload(workload, shape)
    dtype = choose_dtype(cluster, settings.engine.dtype)
    bits, _ = usable_bits(shape, settings.quant)
    check_lm_head(shape.vocab, shape.embed_dim, settings.quant)
    sizes = {
        phase: micro_batches(phase, getattr(settings.planner.micro_batches, phase), workload.sequences)
        for phase in ("prefill", "decode")
    }
    quant, note = _with_kernel(settings, cluster, out, (shape, settings.quant, bits, dtype), (sizes, workload))
    setup = current_setup(shape, dtype, find_kernel(quant.kernel), groups_of(quant), quant.lm_head_bits)
    kinds = {device.type.kind for device in cluster.devices}
    captured = "cuda" in kinds and settings.engine.captures(kinds)
    task = Task(path, shape, workload, quant, dtype, tuple(bits), sizes, setup, settings.profiling, note, captured)
    bar = ProgressBar()
    try:
        profile(task, cluster, out, settings.force, bar.show)
    finally:
        bar.close()
    model = summarize(out, shape)
    model.write(out / "latency.json")
    return 0


def _with_kernel(
    settings: ProfileConfig, cluster: Cluster, out: Path, what: tuple, work: tuple
) -> tuple[QuantConfig, dict[str, Any]]:
    """The HQQ settings with the kernel that will run, and a note on how it was chosen: the one asked for, the one that
    an interrupted profile began with, or the fastest on this host's first device."""
    quant, dtype = settings.quant, what[3]
    kinds = sorted({device_type.kind for device_type in cluster.device_types.values()})
    of = {"spec": what[0].spec, "batch_invariant": settings.engine.batch_invariant}
    if quant.kernel == AUTO and (out / "profile.csv").is_file() and not settings.force:
        return select_kernel(quant, kinds, dtype, measured=profiled_kernel(out), **of), {}
    if quant.kernel != AUTO:
        chosen = select_kernel(quant, kinds, dtype, **of)
        return chosen, {"kernel": find_kernel(chosen.kernel).label}
    from ds_llmpq.profiling.kernel_choice import choose_kernel
    from ds_llmpq.profiling.profiler import local_types, open_timer

    with open_timer(local_types(cluster)[0]) as timer:
        choice = choose_kernel(*what, timer, *work)
    print(kernel_table(choice.note()))
    return select_kernel(quant, kinds, dtype, measured=choice.kernel.name, **of), choice.note()


def summarize(out: Path, shape) -> LatencyModel:
    model = fit_profile(read_profile(out / "profile.csv"), shape)
    print(profile_table(model))
    print(f"profile: {out / 'profile.csv'} (use it with planner.profile={out})")
    return model


def kernel_table(note: dict[str, Any]) -> str:
    """Milliseconds of one decoder layer's linears by kernel, width and rows."""
    times = note["kernel_times"]
    if not times:
        return f"kernel: {note['kernel']}"
    rows = sorted({time["rows"] for time in times})
    lines = [f"{'linears of a layer, ms':<24}" + "".join(f"{f'{count} rows':>12}" for count in rows)]
    for kernel, bits in dict.fromkeys((time["kernel"], time["bits"]) for time in times):
        found = {time["rows"]: time["seconds"] for time in times if (time["kernel"], time["bits"]) == (kernel, bits)}
        lines.append(f"{f'{kernel} {bits} bits':<24}" + "".join(f"{1e3 * found[count]:>12.2f}" for count in rows))
    return "\n".join([*lines, f"kernel: {note['kernel']}"])
