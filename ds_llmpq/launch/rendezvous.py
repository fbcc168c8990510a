"""Where the ranks meet: a store that listens on the address the others were told, and on no other.

torch's own rendezvous listens on all of a machine's addresses. Here rank 0 binds MASTER_ADDR: loopback where all ranks
are on this machine, else the interface of the cluster's network.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import socket
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

from ds_llmpq.errors import PortTaken
from ds_llmpq.launch.environment import read_mark, read_meeting_place, read_place

METHOD = "dsllmpq://"


def register() -> str:
    """Makes the rendezvous known to torch; returns the `init_method` that chooses it. May be called again."""
    with contextlib.suppress(RuntimeError):  # it is known already
        register_rendezvous_handler(METHOD.removesuffix("://"), _rendezvous)
    return METHOD


def _rendezvous(url: str, timeout: datetime.timedelta = datetime.timedelta(minutes=30), **_: object) -> Iterator[tuple]:
    """torch's protocol: yields (store, rank, world size) once."""
    (host, port), (rank, world_size) = read_meeting_place(), read_place()
    listener = listen(host, port) if rank == 0 else None
    given = {} if listener is None else {"master_listen_fd": listener.detach()}
    store = dist.TCPStore(host, port, world_size, rank == 0, timeout, **given)
    yield dist.PrefixStore(_build_prefix(), store), rank, world_size


def _build_prefix() -> str:
    """Of every key, from the run's own random mark, which its ranks alone have in their environment: another process
    that reaches the store by mistake, or guesses at torch's keys, meets none. It is no lock: a store lists its keys to
    who asks."""
    mark = read_mark()
    return hashlib.sha256(b"ranks of " + mark.encode()).hexdigest() if mark else "by hand"


def listen(host: str, port: int) -> socket.socket | None:
    """A socket listening at host:port alone; None where this machine does not know that address as its own (behind
    address translation), so that it must listen on all. `PortTaken`: another socket is there, or it is not allowed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError) or error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"Port {port} of {host} cannot be listened on ({error.strerror}); give another engine.master_port."
            ) from None
        return None
    return listener
