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
    """Captures on one device. All graphs share one pool of memory, so the outputs of one are lost when another is
    replayed."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., Outputs], buffers: Sequence[torch.Tensor]) -> Callable[[], Outputs]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(*buffers)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile: nccl's watches its transfers
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(*buffers)

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


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
