"""`CudaGraphs` against stand-ins for torch's streams and graphs, which note the current stream: where outputs lie, what
lives on, and what a capture that fails leaves behind."""

import contextlib
import gc
import weakref

import pytest
import torch

from ds_llmpq.engine.runner.capture import CudaGraphs


class Stream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


class Graph:
    def replay(self):
        pass


class Cuda:
    """The current stream, and the graphs in the order of their captures."""

    def __init__(self):
        self.main = self.current = Stream()
        self.graphs, self.pools = [], []

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """As torch's: where ending the capture raises, its stream stays the current one."""
        assert capture_error_mode == "thread_local"
        self.graphs.append(weakref.ref(graph))
        self.pools.append(pool)
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()
    for name, value in {
        "graph_pool_handle": object, "Stream": Stream, "CUDAGraph": Graph, "stream": found.stream,
        "graph": found.graph, "current_stream": lambda device=None: found.current,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def step(rows):
    """What a stage gives: hidden states, and logits."""
    return lambda: (torch.full((rows, 1, 4), float(rows)), torch.full((rows, 9), float(rows)))


def test_graphs_share_the_memory_of_their_outputs(cuda):
    capture = CudaGraphs(torch.device("cpu"))
    large, small = capture(step(8), ()), capture(step(3), ())
    hidden, logits = large()
    assert (len(hidden), len(logits)) == (8, 8)
    assert [each.data_ptr() for each in small()] == [hidden.data_ptr(), logits.data_ptr()]
    assert torch.equal(small()[1], torch.full((3, 9), 3.0))
    assert torch.equal(logits[3:], torch.full((5, 9), 8.0))
    larger = capture(step(9), ())
    assert larger()[1].data_ptr() != logits.data_ptr()
    assert len(set(cuda.pools)) == 1


def test_what_gives_one_tensor_or_none_is_captured_too(cuda):
    capture = CudaGraphs(torch.device("cpu"))
    assert torch.equal(capture(lambda: torch.ones(2, 3), ())(), torch.ones(2, 3))
    assert capture(lambda: None, ())() is None
    hidden, logits = capture(lambda: (torch.ones(2, 3), None), ())()
    assert hidden.shape == (2, 3)
    assert logits is None


def test_the_pool_is_never_left_without_a_graph(cuda):
    capture = CudaGraphs(torch.device("cpu"))
    replays = [capture(step(2), ()), capture(step(4), ())]
    replays.clear()
    gc.collect()
    assert [graph() is not None for graph in cuda.graphs] == [False, True]


def test_warm_up_and_capture_run_on_one_stream_of_their_own(cuda):
    capture, seen = CudaGraphs(torch.device("cpu")), []
    for _ in range(2):
        capture(lambda: seen.append(cuda.current), ())
    assert len(set(seen)) == 1
    assert len(seen) == 6
    assert seen[0] is not cuda.main
    assert cuda.main.waited == [seen[0]] * 2
    assert seen[0].waited == [cuda.main] * 2


def test_the_stream_is_the_one_before_when_a_capture_fails(cuda):
    calls = []

    def fail_in_capture():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs(torch.device("cpu"))(fail_in_capture, ())
    assert cuda.current is cuda.main
