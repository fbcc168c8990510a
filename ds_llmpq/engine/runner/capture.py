"""Recording a function of static tensors once, to be replayed without Python: what reads and writes the same buffers at
every call, with no shape and no branch that hangs on a value.

`capture_cuda_graph` is what GPUs run. `capture_trace` records the same function on any device, so that what is fit for
a graph is proven where there is no GPU: a host read or a shape that follows a value ends it with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx

Outputs = TypeVar("Outputs")
_WARM_UP_CALLS = 2  # libraries take workspaces and choose algorithms in the first calls, which a graph must not record


class Capture(Protocol):
    """Records `function(*buffers)` and gives what replays it on what the buffers then hold. It may be called more than
    once while it is recorded."""

    def __call__(self, function: Callable[..., Outputs], buffers: Sequence[torch.Tensor]) -> Callable[[], Outputs]: ...


class CudaGraphs:
    """Captures on one device. All graphs share one pool of memory, and the buffers that their outputs are copied to, so
    the outputs of one are lost when another is replayed. Outputs: tensors with as many rows as vary, tuples of them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # of warm-up and capture: cuBLAS has a workspace for each stream, which then lies outside of the pool
        self._stream = torch.cuda.Stream(device)
        self._outputs: dict[tuple, torch.Tensor] = {}
        self._newest: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[..., Outputs], buffers: Sequence[torch.Tensor]) -> Callable[[], Outputs]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_CALLS):
                outputs = function(*buffers)
            held = self._hold(outputs)
            del outputs
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream the current one. In other threads the device may be used meanwhile:
        # nccl's watches its transfers.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            _copy(function(*buffers), held)
        # torch takes no pool again whose graphs are all gone while something in it is in use
        self._newest = graph

        def replay() -> Outputs:
            graph.replay()
            return held

        return replay

    def _hold(self, output: Outputs, place: int = 0) -> Outputs:
        """Memory for such outputs, outside of the pool, where each graph would keep its own: an earlier graph's if that
        has as many rows."""
        if isinstance(output, tuple):
            return tuple(self._hold(each, place) for place, each in enumerate(output))
        if output is None:
            return None
        kind = place, output.shape[1:], output.dtype
        if kind not in self._outputs or len(self._outputs[kind]) < len(output):
            self._outputs[kind] = output.new_empty(output.shape)
        return self._outputs[kind][: len(output)]


def _copy(output: Outputs, held: Outputs) -> None:
    if isinstance(output, tuple):
        for pair in zip(output, held, strict=True):
            _copy(*pair)
    elif output is not None:
        held.copy_(output)


def capture_trace(function: Callable[..., Outputs], buffers: Sequence[torch.Tensor]) -> Callable[[], Outputs]:
    """By `make_fx`: the operations that one call makes, whatever the buffers held."""
    with torch.no_grad():
        # without values: what reads one, or takes a shape from one, raises
        make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*buffers)
        # fake tensors may take another kernel of attention, whose last bits differ
        traced = make_fx(function)(*buffers)

    def replay() -> Outputs:
        with torch.no_grad():
            return traced(*buffers)

    return replay
