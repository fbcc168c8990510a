"""Order between the streams of a device, kept in one place: work beside the main stream, and who waits for whom.

Four rules make it right on CUDA. Work that another stream needs is marked by an event, which the other stream waits
for; the host waits only for what it reads or writes itself. A tensor that one stream allocates and another uses is lent
to it, or the allocator would hand out its memory too early. Memory that the host writes again, such as a pinned buffer,
is written only after the event of its last copy. What does not depend on the main stream is enqueued beside it, where
it does not wait for the work that was enqueued there before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """The host waits until the device has come to it."""


class Streams(Protocol):
    def beside(self) -> contextlib.AbstractContextManager:
        """What is enqueued inside goes to the side stream, which does not wait for the main one."""

    def mark(self) -> Mark:
        """Of all that the current stream has been given so far."""

    def wait(self, mark: Mark) -> None:
        """The current stream goes on after it; the host does not wait."""

    def lend(self, tensor: torch.Tensor) -> None:
        """The current stream uses a tensor that another one has allocated."""


class CudaStreams:
    """The current stream of a CUDA device, and one beside it."""

    def __init__(self, device: torch.device):
        self._device, self._side = device, torch.cuda.Stream(device)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        with torch.cuda.stream(self._side):
            yield

    def mark(self) -> Mark:
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def lend(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))


class _Done:
    def synchronize(self) -> None: ...


class HostStreams:
    """A CPU does everything in order."""

    def beside(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return _Done()

    def wait(self, mark: Mark) -> None: ...

    def lend(self, tensor: torch.Tensor) -> None: ...


def open_streams(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
