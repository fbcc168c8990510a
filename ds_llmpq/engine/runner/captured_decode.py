"""Decode passes of one stage as captured graphs: one for each shape, chosen by the rows and a bucket of the context.

An eager pass costs the host tens of microseconds for each of some 66 operations a layer; a replayed one costs it one
launch. What changes from pass to pass (tokens or hidden states, positions) is copied into buffers that never move.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ds_llmpq.cost.captured_graphs import MOST_GRAPHS, context_bucket
from ds_llmpq.engine.kv_cache import DecodeCache, KVStore
from ds_llmpq.engine.runner.capture import Capture
from ds_llmpq.engine.runner.fusion import Fusion
from ds_llmpq.models.block import Experts
from ds_llmpq.models.step import Step

Outputs = tuple[torch.Tensor, torch.Tensor | None]  # hidden states, and logits on the last stage


@dataclass(frozen=True)
class Shape:
    """What a graph was captured for. `slots`, `capacity`, `prefix_tokens`: of the whole store, whose strides they give;
    `shares`: whether rows attend to the prefix."""

    first_slot: int
    rows: int
    kv_tokens: int
    slots: int
    capacity: int
    prefix_tokens: int
    shares: bool


@contextlib.contextmanager
def fix_shapes(module: nn.Module) -> Iterator[None]:
    """Every expert sees every token, while a pass is captured and no longer: prefill would pay for it."""
    experts = [part for part in module.modules() if isinstance(part, Experts)]
    for part in experts:
        part.static = True
    try:
        yield
    finally:
        for part in experts:
            part.static = False


class CapturedDecode:
    """Runs the decode passes of `module`, a stage, by graphs that `capture` records when a shape is first met.

    The states it returns are its own memory, which the next pass writes over. hidden_size: features of the hidden
    states that come in; 0 on the first stage, where token ids come. fusion: compiled blocks to capture.
    """

    def __init__(
        self,
        module: nn.Module,
        store: KVStore,
        positional: Callable[[Step], None],
        capture: Capture,
        dtype: torch.dtype,
        hidden_size: int = 0,
        most_graphs: int = MOST_GRAPHS,
        fusion: Fusion | None = None,
    ):
        self.module = module
        self.store = store
        self.positional = positional
        self.capture = capture
        self.most_graphs = most_graphs
        self.fusion = fusion
        self._hidden_size, self._dtype = hidden_size, dtype
        self._graphs: OrderedDict[Shape, Callable[[], Outputs]] = OrderedDict()
        self._make_buffers(1)

    def run(self, step: Step) -> Outputs:
        """A decode step of one token a row, whose rows are neighbouring slots. What the eager pass gives."""
        shape = self._find_shape(step)
        rows = shape.rows
        if rows > len(self._positions):
            # graphs know their buffers by address
            self._graphs.clear()
            self._make_buffers(rows)
        self._fill_buffers(step, shape)
        return self._find_graph(shape)()

    @property
    def graphs(self) -> int:
        """How many are held."""
        return len(self._graphs)

    def _find_shape(self, step: Step) -> Shape:
        if not isinstance(step.cache, DecodeCache):
            raise TypeError(f"a captured decode pass needs the cache of a decode pass, not {type(step.cache).__name__}")
        slots, store = step.cache.slots, self.store
        bucket = context_bucket(step.kv_tokens, store.capacity)
        shares = step.shared is not None
        return Shape(
            slots.start, slots.stop - slots.start, bucket, store.slots, store.capacity, store.prefix_tokens, shares
        )

    def _fill_buffers(self, step: Step, shape: Shape) -> None:
        rows = shape.rows
        self._positions[:rows].copy_(step.positions[:, 0], non_blocking=True)
        if shape.shares:
            self._shared[:rows].copy_(step.shared, non_blocking=True)
        inputs = step.hidden if self._hidden_size else step.token_ids
        self._inputs[:rows].copy_(inputs, non_blocking=True)

    def _list_buffers(self, shape: Shape) -> tuple[torch.Tensor, ...]:
        """What `_step` takes behind the shape."""
        rows = shape.rows
        return self._inputs[:rows], self._positions[:rows], self._shared[:rows], self.store.memory

    def _find_graph(self, shape: Shape) -> Callable[[], Outputs]:
        if shape not in self._graphs:
            while len(self._graphs) >= self.most_graphs:
                self._graphs.popitem(last=False)
            with fix_shapes(self.module), self.fusion.use() if self.fusion else contextlib.nullcontext():
                self._graphs[shape] = self.capture(partial(self._step, shape), self._list_buffers(shape))
        self._graphs.move_to_end(shape)
        return self._graphs[shape]

    def _step(
        self, shape: Shape, inputs: torch.Tensor, positions: torch.Tensor, shared: torch.Tensor, memory: torch.Tensor
    ) -> Outputs:
        """Nothing changes from call to call but what the tensors hold."""
        first, stop = shape.first_slot, shape.first_slot + shape.rows
        shared = shared if shape.shares else None
        step = Step(
            positions=positions[:, None],
            cache=self.store.over(memory).decode(first, stop, positions, shape.kv_tokens, shared),
            kv_tokens=shape.kv_tokens,
            causal_only=False,
            shared=shared,
            prepare=self.positional,
        )
        return self._pass(step, inputs)

    def _pass(self, step: Step, inputs: torch.Tensor) -> Outputs:
        if self._hidden_size:
            step.hidden = inputs
        else:
            step.token_ids = inputs
        done = self.module(step)
        return done.hidden, done.logits

    def _make_buffers(self, rows: int) -> None:
        """For all slots, so that graphs are captured anew only where a later shape of the store has more."""
        most = max(self.store.slots, rows)
        device = self.store.device
        self._positions, self._shared = torch.zeros(2, most, dtype=torch.long, device=device)
        if self._hidden_size:
            self._inputs = torch.zeros(most, 1, self._hidden_size, dtype=self._dtype, device=device)
        else:
            self._inputs = torch.zeros(most, 1, dtype=torch.long, device=device)
