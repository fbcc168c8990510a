"""What a schedule was worth, over the whole run."""

from __future__ import annotations

import numpy as np

from ds_llmpq.research.queue_simulator import Schedule
from ds_llmpq.scheduler.jobs import Jobs


def schedule_metrics(jobs: Jobs, schedule: Schedule) -> dict[str, float]:
    """Job completion time (JCT) and waiting in seconds, throughput over the makespan, padding.

    Waiting is until a job's first start. The makespan runs from the first arrival to the last completion.
    `padded_token_share` counts prompt and answer positions. `throughput_at_quarter_jobs_per_second` is what the
    published evaluation reported: jobs per second when a quarter of them is done, counted from time zero.
    """
    jct = schedule.completion_seconds - jobs.arrival_seconds
    waiting = schedule.start_seconds - jobs.arrival_seconds
    makespan = float(schedule.completion_seconds.max() - jobs.arrival_seconds[0])
    tokens, prompts = int(jobs.generated_tokens.sum()), int(jobs.prompt_tokens.sum())
    slots = schedule.generated_slots + schedule.prompt_slots
    quarter = int(np.percentile(np.arange(len(jobs)), 25))
    return {
        "jobs": len(jobs),
        "jct_mean_seconds": float(jct.mean()),
        "jct_p50_seconds": float(np.percentile(jct, 50)),
        "jct_p99_seconds": float(np.percentile(jct, 99)),
        "waiting_mean_seconds": float(waiting.mean()),
        "waiting_p99_seconds": float(np.percentile(waiting, 99)),
        "waiting_max_seconds": float(waiting.max()),
        "makespan_seconds": makespan,
        "throughput_jobs_per_second": len(jobs) / makespan,
        "throughput_tokens_per_second": tokens / makespan,
        "busy_share": schedule.busy_seconds / makespan,
        "padded_token_share": 1 - (tokens + prompts) / slots,
        "padded_generated_share": 1 - tokens / schedule.generated_slots,
        "throughput_at_quarter_jobs_per_second": quarter / float(np.sort(schedule.completion_seconds)[quarter]),
    }
