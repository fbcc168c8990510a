"""Before anything is loaded: is the memory that each stage was planned for free now?"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from ds_llmpq.cluster.detect import available_memory_bytes
from ds_llmpq.engine.rank_context import RankContext
from ds_llmpq.errors import UserError
from ds_llmpq.plan import Plan

_GIB = 1 << 30
_GO, _AGAIN = b"go", b"again"
_PAUSE_SECONDS = 1.0


def check_memory(plan: Plan, context: RankContext, wait_seconds: float = 0.0) -> None:
    """Every rank says what is free on its device, before any of them takes something; the driver raises `UserError`
    where that is less than planned, and the others wait for its word. `wait_seconds`: so long it may become free, since
    a process that has just died may still hold it."""
    end = time.monotonic() + wait_seconds
    word = None
    while word != _GO:
        if word is not None:
            time.sleep(_PAUSE_SECONDS)
        reports = context.data.gather({"stage": context.stage_index, "free_bytes": free_bytes(context.device)})
        word = context.data.broadcast(None if reports is None else _decide(plan, reports, end))


def _decide(plan: Plan, reports: Sequence[dict], end: float) -> bytes:
    """Whether to go or to look again; `UserError` when the time for that is over."""
    ordered = sorted(reports, key=lambda report: report["stage"])
    try:
        check_free(plan, [report["free_bytes"] for report in ordered])
    except UserError:
        if time.monotonic() >= end:
            raise
        return _AGAIN
    return _GO


def check_free(plan: Plan, free: Sequence[int]) -> None:
    """`free[j]`: bytes free on the device of stage j, measured before loading. The stages of one host's processor
    share its memory, so their needs are added up; a GPU's memory is its own."""
    needs: dict[str, float] = defaultdict(float)
    smallest: dict[str, float] = {}
    for index, stage in enumerate(plan.stages):
        where = stage.device if stage.kind == "cuda" else f"host {stage.host}"
        needs[where] += stage.memory_bytes.total
        smallest[where] = min(free[index], smallest.get(where, free[index]))
    for where, need in needs.items():
        if need > smallest[where]:
            raise UserError(
                f"The plan needs {need / _GIB:.2f} GiB on {where}, but {smallest[where] / _GIB:.2f} GiB are free there "
                "now; end what else uses it, or plan with a smaller memory_bytes for it in the cluster file."
            )


def free_bytes(device: torch.device) -> int:
    """What this process could still allocate on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()
