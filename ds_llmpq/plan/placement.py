"""Where a plan's stages run, in pipeline order and by rank."""

from ds_llmpq.plan.plan import Plan


def placements(plan: Plan) -> list[tuple[str, int]]:
    """(host, slot) of each stage, in pipeline order."""
    plan.require_deployment()
    return [(str(stage.host), stage.slot) for stage in plan.stages]


def launch_order(plan: Plan) -> list[tuple[str, int]]:
    """(host, slot) by rank: the order of the hostfile's hosts."""
    by_rank = sorted(zip(plan.stages, placements(plan), strict=True), key=lambda pair: pair[0].rank)
    return [place for _, place in by_rank]
