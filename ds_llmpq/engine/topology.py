"""Which rank runs which stage: DeepSpeed's pipeline grid with the plan's order instead of the hostfile's."""

from __future__ import annotations

from deepspeed.runtime.pipe.topology import PipeDataParallelTopology


class PlannedTopology(PipeDataParallelTopology):
    """One pipeline, no data parallelism; `ranks[j]` is the global rank of stage j.

    Ranks follow the hostfile, where a host appears once; a plan may order its devices otherwise (A, B, A).
    """

    def __init__(self, ranks: list[int]):
        super().__init__(num_pp=len(ranks), num_dp=1)
        self.mapping = {coordinate: ranks[coordinate.pipe] for coordinate in self.mapping}
