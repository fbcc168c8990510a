"""What the ranks say to each other: hidden states down the pipeline, tokens back to all, and plain data aside.

Hidden states use the accelerator's communicator and flow one way only. Tokens and plain data use a gloo group of
their own, so they never queue behind hidden states. Message shapes follow from the plan; nothing announces them.

nccl begins a transfer when the stream that asks for it has done its work so far, and its `wait` holds up a stream, not
the host. So a receive is asked for beside the main stream, or it would begin only after the passes that were launched
before it; a send is asked for on the main stream, which computes what is sent; and that a send is over is waited for
by the host, since the main stream would stand still until the next stage has received.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES
from ds_llmpq.models.device_streams import HostStreams, Streams, open_streams

_TOKEN_MESSAGES = 64  # under way to each stage; they are small


class Batch(Protocol):
    """A micro-batch as the channels see it: a name of its own, and how many rows it has."""

    @property
    def size(self) -> int: ...

    def __hash__(self) -> int: ...


class _Sends:
    """Messages on their way out, at most `limit` of them: the next one waits until the oldest has arrived.

    gloo does not say that a send is complete until it is waited for, so without a limit they would pile up.
    """

    def __init__(self, limit: int, streams: Streams):
        self._limit = limit
        self._streams = streams
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, message: torch.Tensor, rank: int, group: dist.ProcessGroup | None = None) -> None:
        # waiting comes before sending: the caller expects an answer to each message only once it is sent
        while len(self._pending) >= self._limit:
            self._await_oldest()
        self._pending.append((dist.isend(message, dst=rank, group=group), message))

    def flush(self) -> None:
        while self._pending:
            self._await_oldest()

    def _await_oldest(self) -> None:
        work, message = self._pending.popleft()
        with self._streams.beside():
            work.wait()
            self._streams.mark().synchronize()
        del message  # its memory may be used again only now


class ActivationChannel:
    """Hidden states from the previous stage and to the next one; a send blocks only if too many are under way.

    `links`: the process groups to the previous and to the next stage (None: the default group)."""

    def __init__(
        self,
        previous: int | None,
        following: int | None,
        dtype: torch.dtype,
        device: torch.device,
        links: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None),
        streams: Streams | None = None,
    ):
        self._previous = previous
        self._following = following
        self._dtype = dtype
        self._device = device
        self._incoming, self._outgoing = links
        self._streams = streams or open_streams(device)
        self._posted: dict[Batch, tuple[dist.Work, torch.Tensor]] = {}
        self._sends = _Sends(IN_FLIGHT_MESSAGES, self._streams)

    def post_receive(self, batch: Batch, shape: tuple[int, int, int]) -> None:
        """Starts to receive [rows, tokens, hidden]; posting again before `wait` changes nothing."""
        if batch not in self._posted:
            with self._streams.beside():
                buffer = torch.empty(shape, dtype=self._dtype, device=self._device)
                self._posted[batch] = (dist.irecv(buffer, src=self._previous, group=self._incoming), buffer)

    def wait(self, batch: Batch) -> torch.Tensor:
        """The hidden states, for the current stream once they are here; on a CPU they are."""
        work, buffer = self._posted.pop(batch)
        work.wait()
        self._streams.lend(buffer)
        return buffer

    def send(self, hidden: torch.Tensor) -> None:
        self._sends.send(hidden.contiguous(), self._following, self._outgoing)

    def flush(self) -> None:
        self._sends.flush()


class TokenChannel:
    """Tokens and finish codes from the last stage to every other one, in the order of the micro-batches.

    A thread waits for the messages, since gloo tells only those who wait that one has come. It lives until `flush`.
    """

    def __init__(self, group: dist.ProcessGroup, source: int, others: list[int]):
        self._group = group
        self._source = source
        self._others = others
        self._posted: deque[tuple[Batch, Future, torch.Tensor]] = deque()
        self._awaited: SimpleQueue[tuple[dist.Work, Future] | None] = SimpleQueue()
        self._waiting: threading.Thread | None = None
        self._sends = _Sends(_TOKEN_MESSAGES * len(others), HostStreams())

    def send(self, tokens: torch.Tensor, finish: torch.Tensor) -> None:
        """Last stage: sends [rows] tokens and finish codes to all."""
        message = torch.stack([tokens, finish]).to(torch.int32)
        for rank in self._others:
            self._sends.send(message, rank, self._group)

    def post_receive(self, batch: Batch) -> None:
        """Other stages: starts to receive the tokens of a micro-batch that has just started."""
        buffer = torch.empty(2, batch.size, dtype=torch.int32)
        work, arrived = dist.irecv(buffer, src=self._source, group=self._group), Future()
        self._posted.append((batch, arrived, buffer))
        self._awaited.put((work, arrived))
        if self._waiting is None:
            # a daemon: a rank that fails must not stay for messages that will not come
            self._waiting = threading.Thread(target=self._wait, name="tokens", daemon=True)
            self._waiting.start()

    def receive(self, wait: bool) -> tuple[Batch, list[int], list[int]] | None:
        """The oldest message: (micro-batch, tokens, finish codes); None if none is there and `wait` is off."""
        if not self._posted or not (wait or self._posted[0][1].done()):
            return None
        batch, arrived, buffer = self._posted.popleft()
        arrived.result()
        return batch, buffer[0].tolist(), buffer[1].tolist()

    def flush(self) -> None:
        """To be called when all messages that were posted have been received."""
        self._sends.flush()
        if self._waiting is not None:
            self._awaited.put(None)
            self._waiting.join()
            self._waiting = None

    def _wait(self) -> None:
        while (posted := self._awaited.get()) is not None:
            work, arrived = posted
            try:
                work.wait()
            except RuntimeError as error:  # the connection is gone; raised where the tokens are received
                arrived.set_exception(error)
            else:
                arrived.set_result(None)


class DataChannel:
    """Small plain data between the driver (rank 0) and all: bytes out, JSON back. Nothing is pickled."""

    def __init__(self, group: dist.ProcessGroup, rank: int, world_size: int):
        self._group = group
        self.rank = rank
        self.world_size = world_size

    def broadcast(self, data: bytes | None) -> bytes:
        """The driver's `data` on every rank."""
        data = data or b""
        if self.world_size == 1:
            return data
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._group)
        payload = torch.empty(int(size), dtype=torch.uint8)
        if data:
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(payload):
            dist.broadcast(payload, src=0, group=self._group)
        return payload.numpy().tobytes()

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value, in rank order, on the driver; None elsewhere."""
        data = json.dumps(value).encode()
        if self.world_size == 1:
            return [json.loads(data)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64), group=self._group)
        if self.rank != 0:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=0, group=self._group)
            return None
        values = [json.loads(data)]
        for source in range(1, self.world_size):
            payload = torch.empty(int(sizes[source]), dtype=torch.uint8)
            dist.recv(payload, src=source, group=self._group)
            values.append(json.loads(payload.numpy().tobytes()))
        return values
