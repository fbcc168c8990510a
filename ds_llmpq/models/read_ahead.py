"""Reads tensors ahead of their use in a thread, while the ones before them are quantized and packed.

For a CPU that brings their pages into memory, no more: they are used where the file is mapped. For a GPU they are
copied to it through pinned buffers that are used in turn, on a stream of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ds_llmpq.models.device_streams import Mark, Streams, open_streams

BUFFER_BYTES = 64 << 20
_BUFFERS = 2  # one is filled while the other is copied
_PAGE = mmap.PAGESIZE

Read = Callable[[Iterable[str]], Iterator[tuple[str, torch.Tensor]]]


class ReadAhead:
    """`read(names)` yields tensors that are views of the mapped file. `buffer_bytes` are those of one pinned buffer."""

    def __init__(
        self, read: Read, device: torch.device, streams: Streams | None = None, buffer_bytes: int = BUFFER_BYTES
    ):
        self._read, self._device = read, device
        self._uploads = device.type != "cpu"
        self._streams = streams or open_streams(device)
        self._thread = ThreadPoolExecutor(1, "read-ahead", self._begin)
        self._expected: dict[str, Future] = {}
        self._buffers: deque[tuple[torch.Tensor, Mark | None]] = deque()
        self._buffer_bytes = buffer_bytes

    def expect(self, names: Iterable[str]) -> None:
        """Begins to read these, which will be taken soon. A name that is never taken keeps its memory."""
        names = [name for name in names if name not in self._expected]
        if not names:
            return
        for name in names:
            self._expected[name] = Future()
        self._thread.submit(self._fetch, {name: self._expected[name] for name in names})

    def take(self, name: str) -> torch.Tensor | None:
        """An expected tensor on the device, ready for its current stream; None: read it yourself."""
        found = self._expected.pop(name, None)
        if found is None:
            return None
        arrived = found.result()
        if arrived is None:
            return None
        tensor, mark = arrived
        self._streams.wait(mark)
        self._streams.lend(tensor)
        return tensor

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._expected.clear()
        self._buffers.clear()

    def _begin(self) -> None:
        """A thread begins with the first device, and to go back there would take memory on it."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _fetch(self, expected: dict[str, Future]) -> None:
        """Whatever raises is met again, and reported, where the tensor is read."""
        with contextlib.suppress(Exception):
            for name, view in self._read(expected):
                if self._uploads:
                    expected[name].set_result(self.upload(view))
                else:
                    will_need(view)
                    expected[name].set_result(None)
        for future in expected.values():
            if not future.done():
                future.set_result(None)

    def upload(self, view: torch.Tensor) -> tuple[torch.Tensor, Mark]:
        """A copy on the device, and the mark after which it is complete."""
        with self._streams.beside():
            copy = torch.empty(view.shape, dtype=view.dtype, device=self._device)
            source, target = (tensor.view(-1).view(torch.uint8) for tensor in (view, copy))
            for start in range(0, len(source), self._buffer_bytes):
                buffer, copied = self._next_buffer()
                if copied is not None:
                    copied.synchronize()
                piece = buffer[: len(source) - start]
                piece.copy_(source[start : start + len(piece)])
                target[start : start + len(piece)].copy_(piece, non_blocking=True)
                self._buffers.append((buffer, self._streams.mark()))
            return copy, self._streams.mark()

    def _next_buffer(self) -> tuple[torch.Tensor, Mark | None]:
        if len(self._buffers) < _BUFFERS:
            pinned = self._device.type == "cuda"
            return torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=pinned), None
        return self._buffers.popleft()


def will_need(view: torch.Tensor) -> None:
    """Has the system read the file's pages under a mapped tensor; returns before they are there."""
    _advise(view, mmap.MADV_WILLNEED)


def drop_pages(view: torch.Tensor) -> None:
    """Gives the pages of a mapped tensor back. If it is read again, they come from the file."""
    _advise(view, mmap.MADV_DONTNEED)


def _advise(view: torch.Tensor, advice: int) -> None:
    start, stop = view.data_ptr(), view.data_ptr() + view.nbytes
    start -= start % _PAGE
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
