"""What a pass takes beside its own work where several stages work on one host: threads that carry messages find no free
processor, and layers find cold caches.

No part of a pass can be timed for it alone. So a trial pipeline decodes with a few real layers a stage, all stages at
once, and what its passes take beyond the works that were timed is the contention. It is counted once a pass of each
stage, whatever the pass: messages are as many in a long one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ds_llmpq.cluster.cluster import Cluster, list_feasible_bits
from ds_llmpq.cluster.devices import COMPUTE_DTYPES, Device
from ds_llmpq.cost.fit import fit_profile
from ds_llmpq.cost.fitted import FittedCosts
from ds_llmpq.cost.latency import RooflineCosts
from ds_llmpq.cost.profile import CONTENTION, Point, Profile, Sample
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.profiling.points import TimingTask
from ds_llmpq.profiling.trial_process import STAGES
from ds_llmpq.quant.kernels.registry import find_kernel, find_stage_kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

MICRO_BATCHES = 2  # of a trial's request group
_MOST_SHARE = 0.5  # of the longest work; on a quiet machine it was 0.05 to 0.4
_MOST_LAYERS, _MOST_BYTES = 4, 8 << 20  # of a trial's stage: passes of a few milliseconds


def find_contention(period: float, works: Sequence[float], messages: float) -> float:
    """Seconds a pass that each stage takes beyond its work, if passes follow one another every `period` seconds while
    `MICRO_BATCHES` of them go round. `works`: seconds of a pass by stage; `messages`: of one way round. At least 0, and
    at most half the longest work: beyond that it is other programs', and a plan outlives them.

    With c for each stage, passes follow one another every max(max works + c, (sum works + stages c + messages) /
    micro-batches): the slowest stage's time, or a micro-batch's share of its way round.
    """
    slowest = period - max(works)
    around = (MICRO_BATCHES * period - sum(works) - messages) / len(works)
    return max(0.0, min(slowest, around, _MOST_SHARE * max(works)))


def count_ranks(devices: Sequence[Device], cluster: Cluster) -> int:
    """Of the trial of these devices, which are started alike: as many, but on CPUs three, for there is a middle stage
    then, unless no plan has one."""
    if devices[0].type.kind != "cpu":
        return len(devices)
    return 2 if len(devices) == len(cluster.devices) == 2 else len(STAGES)


def is_contended(task: TimingTask, devices: Sequence[Device], ranks: int) -> bool:
    """Whether each rank of the trial stands for a device, and its layers are those that are timed."""
    return (
        devices[0].type.kind == "cpu"
        and len(devices) == ranks
        and UNQUANTIZED_BITS in task.bits
        and all(UNQUANTIZED_BITS in list_feasible_bits(device.type, task.dtype) for device in devices)
        and not find_stage_kernel(task.setup.kernel).whole_stage
    )


def count_layers(task: TimingTask, devices: Sequence[Device], ranks: int) -> int:
    """Of each stage of the trial: as busy as in a run where contention is measured, else one."""
    if not is_contended(task, devices, ranks):
        return 1
    layer_bytes = task.shape.layer_parameters * COMPUTE_DTYPES[task.dtype]
    return max(1, min(_MOST_LAYERS, task.shape.layers // ranks, _MOST_BYTES // layer_bytes))


def list_contention(
    found: Mapping[str, Any], layers: int, devices: Sequence[Device], profile: Profile, shape: ModelShape
) -> list[Sample]:
    """A sample for each device type and period of a trial pipeline (`found`) of `layers` unquantized layers a stage,
    whose j-th rank was beside the j-th device; `profile` has the times of their parts."""
    model = fit_profile(profile, shape, keep=lambda entry: entry.point.bits in (0, UNQUANTIZED_BITS))
    setup = profile.setup
    samples = []
    stages = [
        (
            FittedCosts(
                device.type,
                model,
                RooflineCosts(device.type, shape, setup.dtype, setup.groups, find_kernel(setup.kernel)),
            ),
            device,
        )
        for device in devices
    ]
    messages, last = _sum_messages(found["links"], len(devices)), len(devices) - 1
    for entry in found["periods"]:
        rows, past = entry["batch"], entry["past"]
        works = []
        for index, (costs, device) in enumerate(stages):
            over = costs.pass_overhead("decode", rows, 1)
            parts = layers * costs.decode_seconds(UNQUANTIZED_BITS, rows, past)
            parts += costs.embed_seconds(rows, 1) if index == 0 else 0.0
            parts += costs.head_seconds(rows) if index == last else 0.0
            beside = over.first if index == 0 else over.last if index == last else over.middle
            # parts were timed at the device's share of a processor, but a trial takes all of it
            works.append(parts * (device.cpu_share or 1.0) + beside)
        seconds = find_contention(entry["seconds"], works, messages)
        for name in dict.fromkeys(device.type.name for device in devices):
            point = Point(name, CONTENTION, "decode", 0, rows, 1)
            samples.append(Sample(point, entry["round"], 1, 1, seconds, seconds, 0.0))
    return samples


def _sum_messages(links: Sequence[Mapping[str, Any]], stages: int) -> float:
    """Seconds of hidden states from stage to stage and of tokens back, all of them small."""
    times = {
        channel: [median(entry["seconds"]) for entry in links if entry["channel"] == channel]
        for channel in ("activation", "token")
    }
    return (stages - 1) * min(times["activation"], default=0.0) + min(times["token"], default=0.0)
