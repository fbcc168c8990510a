"""One rank's part in serving a plan: load the stage, run request groups, report what was measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_llmpq.cost.captured_graphs import row_bucket
from ds_llmpq.engine import device_memory
from ds_llmpq.engine.batch_limits import build_limits
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.engine.kv_cache import KVStore, NoCache, choose_elements
from ds_llmpq.engine.paged_cache import PagedKVStore
from ds_llmpq.engine.pipeline_engine import InferencePipelineEngine
from ds_llmpq.engine.pipeline_module import PlannedPipelineModule, list_pipeline_layers
from ds_llmpq.engine.processor_use import ProcessorUse
from ds_llmpq.engine.rank_context import RankContext
from ds_llmpq.engine.runner.capture import Capture, CudaGraphs, capture_trace
from ds_llmpq.engine.runner.fusion import Fusion, has_compiler
from ds_llmpq.engine.stage_run.faults import Fault, find_first_faults
from ds_llmpq.engine.throttle import CpuShare
from ds_llmpq.engine.token_chooser import Scorer, StopRule
from ds_llmpq.engine.trace import Trace
from ds_llmpq.errors import UserError
from ds_llmpq.models.generation import load_generation
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.plan import Plan
from ds_llmpq.quant.hqq import count_stored_bytes
from ds_llmpq.quant.kernels.registry import find_stage_kernel
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence, pack_message, unpack_message
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import OnFinished, OnTokens, TakeGroup

OnBroken = Callable[[Sequence, Fault | None], None]

_LOGIT_BYTES = 256 << 20  # in float32, of the positions that are scored together
_WHY = b"\xff" * 8  # the driver asks all ranks why rows were given up, their keys behind it; no group begins so


def _ignore_fault(row: Sequence, fault: Fault | None) -> None:
    """Where nobody wants to know."""


class Session:
    """A loaded stage of `plan`, ready for request groups. Every rank makes one with the same arguments. A plan of a
    model's first layers runs those alone, as a calibration does; who serves checks that it has all (`check_model`).

    `stop_rule` decides on the last stage when a row ends; `on_loaded(name)` is called for each layer read. With a
    `scorer` nothing is generated: rows have one prefill pass, and nothing is cached, captured or compiled for them.
    """

    def __init__(
        self,
        plan: Plan,
        context: RankContext,
        model_path: str | Path,
        stop_rule: StopRule | None,
        on_loaded: Callable[[str], None] = lambda name: None,
        trust_remote_code: bool = False,
        options: EngineConfig | None = None,
        scorer: Scorer | None = None,
    ):
        self.plan = plan
        self.scorer = scorer
        self.options = options or EngineConfig()
        if (budget := self.options.prefill_tokens) is not None and budget < 1:
            raise UserError(f"engine.prefill_tokens is {budget}, but must be 1 or more, or null for what is planned.")
        self.context = context
        self.dtype = getattr(torch, plan.deployment.compute_dtype)
        plan.check_batch_invariant(self.options.batch_invariant)
        started = time.perf_counter()
        checkpoint = open_checkpoint(model_path, trust_remote_code)
        self._held_before = device_memory.held_bytes(context.device)

        def loaded(name: str) -> None:
            # layer by layer: what quantizing freed lies scattered among the packed weights, hundreds of MB in the end
            device_memory.release_freed()
            on_loaded(name)

        loader = LayerLoader(
            checkpoint, [b for stage in plan.stages for b in stage.bits], plan.quant.to_config(), self.dtype,
            context.device, loaded, packed=True, stage=range(0) if scorer else range(*context.stage.layers),
            ahead=range(*context.stage.layers),
        )  # fmt: skip
        self._ragged = plan.is_ragged and loader.kernel.whole_stage and loader.decoder.spec.splits_prompts
        is_last = context.stage_index == len(plan.stages) - 1
        loader.compile_products(range(*context.stage.layers), is_last, self._tell)
        module = PlannedPipelineModule(list_pipeline_layers(loader), plan=plan)
        share = context.stage.cpu_share
        if share:
            CpuShare(share).attach(module)
        self.load_seconds = time.perf_counter() - started
        self.trace = Trace(context.stage_index, context.device)
        shape = read_shape(model_path)
        self.vocabulary, self._splits_prompts = shape.vocab, shape.spec.splits_prompts
        self.store = self._build_kv_store(shape)
        capture = self._build_capture()
        self.engine = InferencePipelineEngine(
            module,
            self.store,
            loader.decoder.positions(context.device),
            self._build_activation_channel(),
            self._build_token_channel(),
            stop_rule,
            self.trace,
            self.dtype,
            checkpoint.config.hidden_size,
            _list_neutral_tokens(checkpoint.config),
            load_generation(model_path),
            capture,
            scorer,
            self._build_fusion(module, loader, capture),
        )
        if isinstance(capture, CudaGraphs) and self.plan.is_paged and has_compiler(context.device):
            self._read_in_place(shape)
        device_memory.release_freed()
        self._growth_of_loading = device_memory.held_bytes(context.device) - self._held_before
        self._use = ProcessorUse()
        self._peak_of_loading = device_memory.peak_bytes(context.device)
        device_memory.restart_peak(context.device)

    def _tell(self, text: str) -> None:
        sys.stderr.write(f"ds-llmpq: stage {self.context.stage_index}: {text}\n")

    @property
    def limits(self) -> MicroBatchLimits:
        """Bounds of the micro-batches, as planned; a scorer caches nothing, and bounds its logits instead."""
        limits = build_limits(
            self.plan, self.options, self._splits_prompts, self._ragged, prefix_tokens=len(self.engine.prefix)
        )
        if self.scorer is None:
            return limits
        tokens = max(1, _LOGIT_BYTES // (4 * self.vocabulary))
        uncached = {"chunked": False, "cache_blocks": 0, "row_buckets": False, "ragged": self._ragged}
        return replace(limits, prefill_tokens=tokens, **uncached)

    @property
    def _captures(self) -> bool:
        return self.scorer is None and self.options.captures(stage.kind for stage in self.plan.stages)

    def _build_capture(self) -> Capture | None:
        """How this stage does it. Without a GPU a trace is no faster, and runs only if it was asked for."""
        if not self._captures:
            return None
        if self.context.device.type == "cuda":
            return CudaGraphs(self.context.device)
        return capture_trace if self.options.decode_graphs else None

    def _build_fusion(self, module: nn.Module, loader: LayerLoader, capture: Capture | None) -> Fusion | None:
        """A trace holds no compiled code."""
        wanted, device = self.options.compile_blocks, self.context.device
        if wanted is None:
            wanted = isinstance(capture, CudaGraphs) and has_compiler(device)
        if not wanted or capture is capture_trace or self.scorer is not None:
            return None
        fusion = Fusion(module, loader.decoder.positions(device), self.dtype, device, self._tell)
        fusion.compile()
        return fusion

    def _read_in_place(self, shape: ModelShape) -> None:
        """Captured decode passes read pages where they lie, if that compiles."""
        from ds_llmpq.engine.runner.flex_pages import FlexPages

        flex = FlexPages(shape.spec, self.context.device)
        if flex.check(self.store, row_bucket(self.plan.micro_batch.decode), self._tell):
            self.engine.passes.captured.flex = flex

    def share_prefix(self, prefix: tuple[int, ...] = ()) -> bool:
        """Computes the driver's `prefix`, what many prompts begin with, once, on all ranks together and before any
        request. False: it is not held, since some stage cannot compute it, so all prompts pass whole."""
        data = self.context.data.broadcast(pack_message(None, [prefix]) if self.context.is_driver else None)
        prefix = unpack_message(data)[1][0]
        self.engine.share_prefix(prefix, self.limits)
        return self.engine.prefix == prefix

    def run_all(
        self,
        take: TakeGroup,
        on_finished: OnFinished,
        on_broken: OnBroken = _ignore_fault,
        on_tokens: OnTokens | None = None,
    ) -> None:
        """Runs the driver's request groups. `take` is called on the driver only, when the slots run short of requests,
        and once more when all have ended: None then is the end. `on_finished(row, tokens, finish)` is called on every
        rank; `on_broken(row, fault)` on the driver, soon after a row finished with NAN_LOGITS: with why it was given
        up, None if its logits were no numbers. `on_tokens`: as `run_stream` has it, where it is given."""
        unexplained: list[Sequence] = []  # on the driver

        def finished(row: Sequence, tokens: list[int], finish: Finish) -> None:
            if finish is Finish.NAN_LOGITS and self.context.is_driver:
                unexplained.append(row)
            on_finished(row, tokens, finish)

        def together() -> RequestGroup | None:
            if unexplained:
                keys = [row.key for row in unexplained]
                self.context.data.broadcast(_WHY + pack_message(None, [keys]))
                explain(keys)
            group = take() if self.context.is_driver else None
            data = self.context.data.broadcast(group.to_bytes() if group else None)
            if not self.context.is_driver and data.startswith(_WHY):
                explain(unpack_message(data.removeprefix(_WHY))[1][0])
                data = self.context.data.broadcast(None)
            return RequestGroup.from_bytes(data) if data else None

        def explain(keys: Iterable[int]) -> None:
            reports = self.context.data.gather(self.engine.faults.take(keys))
            if reports is not None:
                faults = find_first_faults(reports)
                for row in unexplained:
                    on_broken(row, faults.get(row.key))
                unexplained.clear()

        self._use = ProcessorUse()
        held_back = None
        while (group := held_back or together()) is not None:
            held_back = self.engine.run_stream(group, self.limits, together, finished, on_tokens)

    def report(self) -> dict:
        """What this rank measured, as plain data: seconds by kind of work, memory by part, how busy its host was.

        Its memory is weights and cache as allocated, what the process held before loading, its peak with loading, how
        far it had grown when loaded, and how far at most while serving.
        """
        device = self.context.device
        return {
            "rank": self.context.rank,
            "stage": self.context.stage_index,
            "load_seconds": self.load_seconds,
            **self.trace.summary(),
            "decode_graphs": self.engine.passes.captured.graphs if self.engine.passes.captured else 0,
            "passes_ahead": self.engine.ahead.used if self.engine.ahead else 0,
            "memory_warnings": self.engine.splitter.warnings,
            "processors": self._use.measure(),
            "memory_bytes": {
                "weights": count_stored_bytes(self.engine.module),
                "kv": self.store.allocated_bytes,
                "before_loading": self._held_before,
                "peak": max(self._peak_of_loading, device_memory.peak_bytes(device)),
                "growth_of_loading": self._growth_of_loading,
                "peak_growth": device_memory.held_peak_bytes(device) - self._held_before,
            },
        }

    def _build_kv_store(self, shape: ModelShape) -> KVStore | NoCache:
        if self.scorer is not None:
            return NoCache(self.context.device)
        first, last = self.context.stage.layers
        store = PagedKVStore if self.plan.is_paged else KVStore
        kernel = find_stage_kernel(self.context.stage.kernel)
        elements = choose_elements(kernel, shape.head_dim, self.dtype, self.plan.kv_bits)
        return store(
            first, last - first, self.plan.cache_positions, shape.kv_heads, *elements, self.context.device,
            self.plan.cache_block,
        )  # fmt: skip

    def _build_activation_channel(self) -> ActivationChannel:
        index, ranks = self.context.stage_index, self.context.stage_ranks
        previous = ranks[index - 1] if index > 0 else None
        following = ranks[index + 1] if index + 1 < len(ranks) else None
        return ActivationChannel(previous, following, self.dtype, self.context.device, self.context.links)

    def _build_token_channel(self) -> TokenChannel:
        *others, source = self.context.stage_ranks
        return TokenChannel(self.context.side_group, source, others)


def _list_neutral_tokens(config: Any) -> list[int]:
    """Tokens that every prompt may hold: those that begin and end texts, and the first of all."""
    named = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")]
    flat = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys([*(t for t in flat if isinstance(t, int) and 0 <= t < config.vocab_size), 0, 1]))[:4]
