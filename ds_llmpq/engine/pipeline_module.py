"""The model as DeepSpeed sees it: embedding, decoder layers and head, cut where the plan says."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology
from torch import nn

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Plan
from ds_llmpq.quant.layers import LayerLoader


class LazyLayer(LayerSpec):
    """A pipeline layer that is read from the checkpoint only on the rank that owns it."""

    def __init__(self, name: str, load: Callable[[], nn.Module]):
        super().__init__(nn.Module)
        self.name = name
        self.load = load

    def __repr__(self) -> str:
        return self.name

    def build(self, log: bool = False) -> nn.Module:
        return self.load()


def list_pipeline_layers(loader: LayerLoader) -> list[LazyLayer]:
    """Those that the loader has bit widths for; pipeline layer 0 is the embedding, i + 1 decoder layer i, and the last
    the head."""
    decoder = [
        LazyLayer(f"layer {index}", lambda index=index: loader.decoder_layer(index))
        for index in range(len(loader.bits))
    ]
    return [LazyLayer("embedding", loader.embedding), *decoder, LazyLayer("head", loader.head)]


class PlannedPipelineModule(PipelineModule):
    """`PipelineModule` with explicit, uneven parts: those of `plan`, or `bounds` (stage j holds layers
    [bounds[j], bounds[j + 1])). It serves this package's ranks, and trains a user's own model.

    `before`, `after`: how many of `layers` lie ahead of the plan's decoder layers and behind them. `topology`: one
    pipeline over the plan's ranks where it is left out. `options` are PipelineModule's own, such as `loss_fn`.
    `UserError`: other layers than the plan has.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        bounds: list[int] | None = None,
        topology: ProcessTopology | None = None,
        *,
        plan: Plan | None = None,
        before: int = 1,
        after: int = 1,
        **options: Any,
    ):
        if plan is not None:
            bounds = plan.parts(before, after)
            topology = topology or PlannedTopology([stage.rank for stage in plan.stages])
        if bounds is None or bounds[-1] != len(layers):
            raise UserError(
                f"the module has {len(layers)} layers, but the plan parts {bounds[-1] if bounds else 'none'} (its "
                f"decoder layers, {before} before and {after} after them); give plan, before and after that fit."
            )
        self._bounds = bounds
        # DeepSpeed prints its seeds and topology; standard output belongs to the user
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(layers=layers, topology=topology, partition_method="planned", **options)

    def _partition_layers(self, method: str = "planned") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class PlannedTopology(PipeDataParallelTopology):
    """One pipeline, no data parallelism; `ranks[j]` is the global rank of stage j.

    Ranks follow the hostfile, where a host appears once; a plan may order its devices otherwise (A, B, A).
    """

    def __init__(self, ranks: list[int]):
        super().__init__(num_pp=len(ranks), num_dp=1)
        self.mapping = {coordinate: ranks[coordinate.pipe] for coordinate in self.mapping}
