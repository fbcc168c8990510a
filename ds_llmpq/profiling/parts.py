"""The very parts that the engine runs, ready to be timed: loader's layers, static cache, steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ds_llmpq.cost.captured_graphs import context_bucket
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.cost.profile import Point
from ds_llmpq.engine.kv_cache import KVStore, choose_elements
from ds_llmpq.engine.runner.capture import Capture, CudaGraphs
from ds_llmpq.engine.runner.captured_decode import fix_shapes
from ds_llmpq.engine.runner.fusion import Fusion, has_compiler
from ds_llmpq.engine.throttle import CpuShare
from ds_llmpq.integers import round_up
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.models.step import Step
from ds_llmpq.profiling.points import limit_chain
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.registry import find_stage_kernel
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import make_groups

_LONG_PASS = 256  # tokens from which on a layer's weights are a small part of what it reads


class Parts:
    """Decoder layers at each of `bits`, embedding and head of one checkpoint on one device.

    chained: how many decoder layers run one after another (fewer of large ones), as in a stage, so that a small layer's
    weights are no warmer in the caches than they will be; passes of many tokens run one, unless a stage is one graph.
    HQQ's optimiser is left off: it changes values only, and zeros are of the kind that will run either way.
    capture: records what decode passes do, as runs that capture them have it (CUDA graphs of compiled blocks); None:
    everything runs eagerly.
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        bits: Sequence[int],
        quant: QuantConfig,
        dtype: str,
        device: torch.device,
        rows: int,
        capacity: int,
        chained: int,
        on_loaded: Callable[[str], None] = lambda name: None,
        capture: Capture | None = None,
    ):
        self.shape, self.device, self.dtype = shape, device, getattr(torch, dtype)
        self.capture = capture
        checkpoint = Checkpoint(path)
        self._positional = None
        largest = MemoryModel(shape, make_groups(quant), self.dtype.itemsize).layer_bytes(16)
        self.chained = limit_chain(min(chained, shape.layers), largest)
        quick = replace(quant, optimize=False)
        self.layers = {}
        for width in bits:
            loader = LayerLoader(
                checkpoint, [width] * shape.layers, quick, self.dtype, device, on_loaded, packed=True,
                stage=range(self.chained),
            )  # fmt: skip
            loader.compile_products(range(self.chained), True, on_loaded)
            self.layers[width] = [loader.decoder_layer(index) for index in range(self.chained)]
        self.embedding, self.head = loader.embedding(), loader.head()
        self._positional = loader.decoder.positions(device)
        self.fusion = Fusion(nn.ModuleList(), self._positional, self.dtype, device, on_loaded)
        if isinstance(capture, CudaGraphs) and has_compiler(device):  # as runs have it
            every = nn.ModuleList(layer for chain in self.layers.values() for layer in chain)
            self.fusion = Fusion(every, self._positional, self.dtype, device, on_loaded)
            self.fusion.compile()
        self.kernel = find_stage_kernel(quant.kernel)
        block = self.kernel.cache_block
        elements = choose_elements(self.kernel, shape.head_dim, self.dtype, quant.kv_bits)
        self.store = KVStore(
            0, self.chained, rows * round_up(capacity, block), shape.kv_heads, *elements, device, block
        )
        self.store.shape_for(rows, capacity)
        self._throttled: list[torch.utils.hooks.RemovableHandle] = []

    def throttle(self, cpu_share: float) -> None:
        """Gives all parts this share of the processor from now on."""
        for handle in self._throttled:
            handle.remove()
        self._throttled = []
        if cpu_share < 1.0:
            meter = CpuShare(cpu_share)
            for part in [*(layer for chain in self.layers.values() for layer in chain), self.embedding, self.head]:
                self._throttled += meter.attach_layer(part)

    def action(self, point: Point) -> tuple[Callable[[], object], int]:
        """(what to time, how many times the part runs in it)."""
        if point.part == "layer":
            short = point.tokens >= _LONG_PASS and not self.kernel.whole_stage
            chain = self.layers[point.bits][: 1 if short else None]
            return self._capture_pass(self._layers(point, chain), point), len(chain)
        if point.part == "embed":
            tokens = torch.zeros(point.batch, point.length_tokens, dtype=torch.long, device=self.device)
            step = Step(tokens, None, point.length_tokens, True, token_ids=tokens)
            return self._capture_pass(lambda: self.embedding(step).hidden, point), 1
        hidden = self._hidden(point.batch, 1)
        step = Step(torch.zeros(point.batch, 1, dtype=torch.long, device=self.device), None, 1, True, hidden=hidden)
        return self._capture_pass(lambda: self.head(step).logits, point), 1

    def _capture_pass(self, action: Callable[[], torch.Tensor], point: Point) -> Callable[[], torch.Tensor]:
        if self.capture is None or point.phase == "prefill":
            return action
        with self.fusion.use(), fix_shapes(nn.ModuleList(self.layers[point.bits] if point.part == "layer" else ())):
            action()  # masks are computed once a step, outside of what is recorded
            return self.capture(action, ())

    def _layers(self, point: Point, chain: Sequence[nn.Module]) -> Callable[[], torch.Tensor]:
        batch, length = point.batch, point.length_tokens
        if point.phase == "prefill":
            positions = torch.arange(length, device=self.device).expand(batch, length)
            step = Step(positions, self.store.prefill(range(batch)), length, True, hidden=self._hidden(batch, length))
        else:
            at = torch.full((batch,), length, device=self.device)
            alike, seen = self.capture is None, length + 1
            if self.capture is not None:
                seen = context_bucket(seen, self.store.capacity)
            step = Step(at[:, None], self.store.decode(0, batch, at, seen), seen, alike, hidden=self._hidden(batch, 1))
        self._positional(step)  # once a stage and micro-batch, so not a layer's
        hidden = step.hidden

        def run() -> torch.Tensor:
            step.hidden = hidden
            for layer in chain:
                layer(step)
            return step.hidden

        return run

    def _hidden(self, batch: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator(device=self.device).manual_seed(batch * 65537 + tokens)
        return torch.randn(
            batch, tokens, self.shape.hidden, generator=generator, dtype=self.dtype, device=self.device
        )  # fmt: skip
