"""Where the published throughput gain comes from: the same jobs, measured as published and measured right.

The published evaluation runs 50 jobs whose gaps are sorted, smallest first, with a first come, first served that
waits 10 s for partial batches, and takes throughput when a quarter of the jobs is done.
"""

from __future__ import annotations

import numpy as np

from ds_llmpq.research.published_ssjf import Case, schedules
from ds_llmpq.research.scenario import Lengths
from ds_llmpq.scheduler.jobs import Jobs

JOBS = 50
_MODES = {"none": False, "static": False, "dynamic": True}  # batching -> runs to its shortest


def published_ratios(jobs: Jobs, lengths: Lengths, batching: str, max_batch: int) -> dict[str, float] | None:
    """SSJF relative to FCFS in the published simulator, on the first 50 jobs: mean JCT, throughput when a quarter is
    done and when all are. None for continuous batching, which it has not."""
    if batching not in _MODES:
        return None
    count = min(JOBS, len(jobs))
    gaps = np.sort(np.diff(jobs.arrival_seconds[:count], prepend=jobs.arrival_seconds[0]))
    arrival = np.cumsum(gaps)
    labels = lengths.classes[:count] if lengths.classes is not None else jobs.predicted_tokens[:count]
    case = Case(
        arrival.tolist(),
        jobs.generated_tokens[:count].tolist(),
        labels.astype(int).tolist(),
        dynamic=_MODES[batching],
        max_batch=1 if batching == "none" else max_batch,
    )
    found = schedules(case)
    # the published shortest-first may lose the last job: the whole run is compared over the jobs that both finish
    both = found["fcfs"].keys() & found["ssjf"].keys()
    first, shortest = (_measured(found[name], both, arrival) for name in ("fcfs", "ssjf"))
    return {name: shortest[name] / first[name] for name in first}


def _measured(ends: dict[str, float], both: set[str], arrival: np.ndarray) -> dict[str, float]:
    finish = np.sort(list(ends.values()))
    quarter = int(np.percentile(np.arange(len(finish)), 25))
    return {
        "jct_mean": float(np.mean([ends[job] - arrival[int(job)] for job in sorted(both)])),
        "throughput_at_quarter": quarter / float(finish[quarter]),
        "throughput_whole_run": len(both) / max(ends[job] for job in both),
    }
