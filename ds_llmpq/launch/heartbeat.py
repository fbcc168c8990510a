"""The rank's side of monitoring: heartbeats, stacks on a signal, draining, and exiting when `run` dies.

Imports no torch. The other side is `launch.process_monitor`.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

ALIVE_MARK = "ds-llmpq alive"
_POLL_SECONDS = 1.0


def exit_if_parent_dies(descriptor: int = 2) -> None:
    """Exit at once when nobody reads what this process writes to `descriptor` any more.

    That is how a rank learns that `run` has been interrupted or killed: the pipe, or over ssh the connection, breaks.
    """
    poller = select.poll()
    poller.register(descriptor, 0)  # broken pipes are always reported

    def watch() -> None:
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def dump_stacks_on_signal() -> None:
    """`kill -USR1` makes this process write the Python stack of every thread to standard error, and go on."""
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def drain_on_signal(drain: Callable[[], None]) -> None:
    """SIGUSR2 calls `drain`, which is to have what is in flight finished and nothing new begun.

    Not SIGTERM: the launcher sends that to every rank when one has died, and then they are meant to end.
    """

    def request(number: int, frame: FrameType | None) -> None:
        drain()

    signal.signal(signal.SIGUSR2, request)


class Heartbeat:
    """Reports that this rank makes progress, as long as it does; a daemon thread looks once a second.

    A rank makes progress when `beat` is called or when the count that `watch` was given changes. After
    `stacks_seconds` without progress the stacks of all threads go to standard error. The timer for that needs no
    Python to run, so it works on every host, even where this thread is stuck.
    """

    def __init__(self, stacks_seconds: float | None, say: Callable[[], None] | None = None):
        self._beats = 0
        self._count: Callable[[], object] = lambda: None
        self._stacks_seconds = stacks_seconds
        self._say = say or _say_alive
        self._seen: object = object()
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="heartbeat", daemon=True).start()

    def beat(self, *_: object) -> None:
        """Something was done; arguments are ignored, so that it fits as a callback."""
        self._beats += 1

    def watch(self, count: Callable[[], object]) -> None:
        """From now on, also any change of `count()` is a sign of life; it is read from another thread."""
        self._count = count

    def close(self) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        while not self._ended.is_set():
            now = (self._beats, self._count())
            if now != self._seen:
                self._seen = now
                self._say()
                if self._stacks_seconds is not None:
                    faulthandler.dump_traceback_later(self._stacks_seconds, file=sys.stderr)
            self._ended.wait(_POLL_SECONDS)


def _say_alive() -> None:
    sys.stderr.write(ALIVE_MARK + "\n")  # in one piece: the ranks share the stream
    sys.stderr.flush()
