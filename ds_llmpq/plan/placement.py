"""Where a plan's stages run, in pipeline order and by rank."""

from ds_llmpq.errors import UserError
from ds_llmpq.plan.plan import Plan


def placements(plan: Plan) -> list[tuple[str, int]]:
    """(host, slot) of each stage, in pipeline order."""
    if plan.engine is None:
        raise UserError("The plan names no hosts; plan with cluster=... instead of problem=...")
    slots = (entry["slot"] for entry in plan.engine["stages"])
    return [(str(stage.host), slot) for stage, slot in zip(plan.stages, slots, strict=True)]


def launch_order(plan: Plan) -> list[tuple[str, int]]:
    """(host, slot) by rank: the order of the hostfile's hosts."""
    by_rank = sorted(zip(plan.stages, placements(plan), strict=True), key=lambda pair: pair[0].rank)
    return [place for _, place in by_rank]
