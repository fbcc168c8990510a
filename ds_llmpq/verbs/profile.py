"""`profile`: the parts of a model timed on this host's device types, for `plan planner.profile=DIR`."""

from __future__ import annotations

import os
from pathlib import Path

from ds_llmpq import config
from ds_llmpq.batch.progress import Bar
from ds_llmpq.batch.workload import sized_workload
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.gates import common_dtype
from ds_llmpq.cost.fit import LatencyModel, fit_profile
from ds_llmpq.cost.profile import current_setup, read_profile
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import read_shape
from ds_llmpq.planner.build import check_workload, micro_batches, usable_bits
from ds_llmpq.report.fidelity import profile_table
from ds_llmpq.schema import ProfileVerb

KERNEL = "dequantize"


def run(settings: ProfileVerb, out: Path) -> int:
    if settings.model.path is None:
        raise UserError("profile times real layers and needs a checkpoint; set model.path=DIR.")
    out.mkdir(parents=True, exist_ok=True)
    cluster = Cluster.from_config(config.cluster_of(settings))
    # before anything imports deepspeed, which looks for an accelerator when it is imported
    os.environ.setdefault("DS_ACCELERATOR", cluster.devices[0].type.kind)
    from ds_llmpq.profiling.profiler import Task, profile

    path = str(config.absolute(settings.model.path))
    shape = read_shape(path)
    workload = sized_workload(settings.workload, settings.model, settings.input, settings.batch, shape)
    check_workload(workload, shape)
    dtype = common_dtype(cluster, settings.engine.dtype)
    bits, _ = usable_bits(shape, settings.quant)
    sizes = {
        phase: micro_batches(phase, getattr(settings.planner.micro_batches, phase), workload.sequences)
        for phase in ("prefill", "decode")
    }
    setup = current_setup(shape, dtype, KERNEL, settings.quant.group_size, settings.quant.axis)
    task = Task(path, shape, workload, settings.quant, dtype, tuple(bits), sizes, setup, settings.profiling)
    bar = Bar()
    try:
        profile(task, cluster, out, settings.force, bar.show)
    finally:
        bar.close()
    model = summarize(out, shape)
    model.write(out / "latency.json")
    return 0


def summarize(out: Path, shape) -> LatencyModel:
    model = fit_profile(read_profile(out / "profile.csv"), shape)
    print(profile_table(model))
    print(f"profile: {out / 'profile.csv'} (use it with planner.profile={out})")
    return model
