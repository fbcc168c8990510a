"""A simulator that walks: linear scans instead of heaps, one iteration at a time. Shares no code with the fast one."""

import math

C, P = 0.1, 0.02


def slow_simulate(  # noqa: C901 (one piece, so that it shares nothing)
    jobs, policy, batching, rows, guard=("overdue", 100.0, 10.0), prediction_seconds=0.0, wait=0.0
):
    """(start, end) lists for a cost of C + P * tokens."""
    n = len(jobs)
    arrival = list(map(float, jobs.arrival_seconds))
    true = list(map(int, jobs.generated_tokens))
    seen = true if policy == "sjf" else list(map(float, jobs.predicted_tokens))
    guarded = "none" if policy == "fcfs" else guard[0]
    guarded = "overdue" if policy == "longest_first" and guarded == "aging" else guarded
    ready, free_at = [], 0.0
    for a in arrival:
        free_at = max(free_at, a) + prediction_seconds if policy in ("ssjf", "longest_first") else a
        ready.append(free_at)
    tokens_done, served = [0.0] * n, [0.0] * n
    start, end = [math.nan] * n, [math.nan] * n
    waiting, come, now = [], 0, 0.0

    def arrive():
        nonlocal come
        while come < n and ready[come] <= now:
            waiting.append(come)
            come += 1

    def late(j):
        limit = min(guard[1], guard[2] * (C + P * seen[j]))
        return guarded == "overdue" and now > arrival[j] + served[j] + limit

    def key(j):
        if policy == "fcfs":
            return j
        left = seen[j] - tokens_done[j]
        left = left if left > 0 or tokens_done[j] == 0 else tokens_done[j]
        if guarded == "aging":
            return arrival[j] + served[j] + min(guard[1], guard[2] * (C + P * left))
        return -left if policy == "longest_first" else left

    def take(count):
        chosen = sorted(waiting, key=lambda j: (0, j, 0) if late(j) else (1, key(j), j))[:count]
        for j in chosen:
            waiting.remove(j)
            start[j] = now if math.isnan(start[j]) else start[j]
        return chosen

    if batching == "continuous":
        slots = {}
        while waiting or slots or come < n:
            arrive()
            for j in take(rows - len(slots)):
                slots[j] = true[j] + math.ceil(round(C / P, 9))
            if not slots:
                now = ready[come]
                continue
            now += P
            for j in list(slots):
                slots[j] -= 1
                if slots[j] == 0:
                    end[j] = now
                    del slots[j]
        return start, end

    rows = 1 if batching == "none" else rows
    seconds = [C + P * t for t in true]
    while waiting or come < n:
        arrive()
        if not waiting:
            now = ready[come]
            arrive()
        missing = rows - len(waiting)
        if missing > 0 and wait:
            limit = now + wait
            now = min(limit, ready[come + missing - 1]) if come + missing - 1 < n else limit
            arrive()
        batch = take(rows)
        spent = (min if batching == "dynamic" else max)(seconds[j] for j in batch)
        now += spent
        arrive()
        for j in batch:
            seconds[j] -= spent
            served[j] += spent
            tokens_done[j] += spent / P
            if seconds[j] <= 1e-8:
                end[j] = now
            else:
                waiting.append(j)
    return start, end
