"""Where the ranks meet: a store that listens only on the address that the ranks know.

torch's own rendezvous listens on all addresses of a machine. Here rank 0 listens only on MASTER_ADDR: loopback if all
ranks are on this machine, else the interface of the cluster's network.
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
    """Registers the rendezvous with torch and returns its `init_method`. May be called again."""
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
    """A prefix for every key, so that another process does not hit one by mistake or by guessing: a hash of the run's
    random mark, which only its ranks have in their environment. It is no lock: a store lists its keys on request."""
    mark = read_mark()
    return hashlib.sha256(b"ranks of " + mark.encode()).hexdigest() if mark else "by hand"


def listen(host: str, port: int) -> socket.socket | None:
    """A socket listening only at host:port; None if this machine does not have that address (behind address
    translation), so that it must listen on all. `PortTaken`: the port is in use or not allowed."""
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
                f"Port {port} of {host} cannot be used ({error.strerror}); give another engine.master_port."
            ) from None
        return None
    return listener
