"""One rank's part in serving a plan: load the stage, run waves, report what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ds_llmpq.engine import memory
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.engine.distributed import Place
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.pipeline_engine import InferencePipelineEngine, StopRule
from ds_llmpq.engine.pipeline_module import PlannedPipelineModule, pipeline_bounds, pipeline_layers
from ds_llmpq.engine.sequences import Sequences, decode_groups, prefill_micro_batches
from ds_llmpq.engine.stage_loader import StageLoader
from ds_llmpq.engine.throttle import CpuShare
from ds_llmpq.engine.topology import PlannedTopology
from ds_llmpq.engine.trace import Trace
from ds_llmpq.engine.wave import Wave
from ds_llmpq.models.architecture import architecture_of
from ds_llmpq.models.shape import read_shape
from ds_llmpq.planner.plan import Plan
from ds_llmpq.planner.planfile import check_model
from ds_llmpq.quant.checkpoint import open_checkpoint
from ds_llmpq.quant.hqq import stored_bytes
from ds_llmpq.schema import QuantConfig


class Session:
    """A loaded stage of `plan`, ready for waves. Every rank makes one with the same arguments.

    `stop_rule` decides on the last stage when a row ends; `on_loaded(name)` is called for each layer read.
    """

    engine_type: type[InferencePipelineEngine] = InferencePipelineEngine

    def __init__(
        self,
        plan: Plan,
        place: Place,
        model_path: str | Path,
        stop_rule: StopRule,
        on_loaded: Callable[[str], None] = lambda name: None,
        trust_remote_code: bool = False,
    ):
        self.plan = plan
        self.place = place
        self.dtype = getattr(torch, plan.engine["dtype"])
        started = time.perf_counter()
        checkpoint = open_checkpoint(model_path, trust_remote_code)
        architecture_of(checkpoint.config)  # what it imports belongs to the process, not to the stage
        self._resident_bytes = memory.used_bytes(place.device)
        check_model(plan, model_path)

        def loaded(name: str) -> None:
            # layer by layer: what quantizing freed lies scattered among the packed weights, hundreds of MB in the end
            memory.release_freed()
            on_loaded(name)

        loader = StageLoader(
            checkpoint, [b for stage in plan.stages for b in stage.bits], QuantConfig(**plan.quant), self.dtype,
            place.device, loaded,
        )  # fmt: skip
        module = PlannedPipelineModule(
            pipeline_layers(loader),
            pipeline_bounds([stage.layers for stage in plan.stages], checkpoint.config.num_hidden_layers),
            PlannedTopology(place.stage_ranks),
        )
        share = plan.engine["stages"][place.stage_index].get("cpu_share")
        if share:
            CpuShare(share).attach(module)
        self.load_seconds = time.perf_counter() - started
        self.trace = Trace(place.stage_index, place.device)
        self.store = self._kv_store(model_path)
        self.engine = self.engine_type(
            module,
            self.store,
            loader.architecture.positional(checkpoint.config),
            self._activation_channel(),
            self._token_channel(),
            stop_rule,
            self.trace,
            self.dtype,
            checkpoint.config.hidden_size,
        )

    @property
    def slots(self) -> int:
        """Cache positions of all sequences in flight together, as planned."""
        return cache_slots(self.plan)

    def run(self, wave: Wave, on_finished: Callable[[int], None] = lambda row: None) -> Sequences:
        """Generates for all rows of a wave."""
        sizes, workload = self.plan.micro_batch, self.plan.workload
        prompt_tokens = [len(row.prompt) for row in wave.rows]
        prefill = prefill_micro_batches(prompt_tokens, sizes["prefill"], sizes["prefill"] * workload.prompt_tokens)
        return self.engine.run_wave(wave, prefill, decode_groups(len(wave.rows), sizes["decode"]), on_finished)

    def run_all(self, waves: Iterator[Wave], on_finished: Callable[[Wave, Sequences, int], None]) -> None:
        """Runs the driver's waves (`waves` is read on the driver only) until there are none left.

        The next wave is handed out before the current one starts, so no stage waits for it in between.
        """
        upcoming = self._next(waves)
        while upcoming is not None:
            current, upcoming = upcoming, self._next(waves)
            self.run(current, lambda row, wave=current: on_finished(wave, self.engine.sequences, row))

    def report(self) -> dict:
        """What this rank measured, as plain data: seconds by kind of work, memory by part."""
        device = self.place.device
        return {
            "rank": self.place.rank,
            "stage": self.place.stage_index,
            "load_seconds": self.load_seconds,
            **self.trace.summary(),
            "memory_bytes": {
                "weights": stored_bytes(self.engine.module),
                "kv": self.store.allocated_bytes,
                "before_loading": self._resident_bytes,
                "peak": memory.peak_bytes(device),
                "peak_growth": memory.peak_bytes(device) - self._resident_bytes,
            },
        }

    def _next(self, waves: Iterator[Wave]) -> Wave | None:
        wave = next(waves, None) if self.place.is_driver else None
        data = self.place.data.broadcast(wave.to_bytes() if wave else None)
        return Wave.from_bytes(data) if data else None

    def _kv_store(self, model_path: str | Path) -> KVStore:
        shape = read_shape(model_path)
        first, last = self.place.stage.layers
        return KVStore(first, last - first, self.slots, shape.kv_heads, shape.head_dim, self.dtype, self.place.device)

    def _activation_channel(self) -> ActivationChannel:
        index, ranks = self.place.stage_index, self.place.stage_ranks
        previous = ranks[index - 1] if index > 0 else None
        following = ranks[index + 1] if index + 1 < len(ranks) else None
        return ActivationChannel(previous, following, self.dtype, self.place.device)

    def _token_channel(self) -> TokenChannel:
        *others, source = self.place.stage_ranks
        return TokenChannel(self.place.side_group, source, others)


def cache_slots(plan: Plan) -> int:
    """B * (s + n): the tokens a layer's cache holds for all sequences in flight."""
    workload = plan.workload
    return workload.sequences * (workload.prompt_tokens + workload.generated_tokens)
