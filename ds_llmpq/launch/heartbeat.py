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


def exit_if_parent_dies() -> None:
    """Exits at once when nobody reads standard error any more: if `run` is interrupted or killed, the pipe breaks, or
    over ssh the connection."""
    poller = select.poll()
    poller.register(2, 0)  # broken pipes are always reported

    def watch() -> None:
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def dump_stacks_on_signal() -> None:
    """Makes `kill -USR1` write the Python stacks of all threads to standard error."""
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def drain_on_signal(drain: Callable[[], None]) -> None:
    """Makes SIGUSR2 call `drain`, which lets requests in flight finish and starts nothing new. SIGTERM is not used for
    this, because the launcher sends it to all ranks when one has died, and then they must end."""

    def request(number: int, frame: FrameType | None) -> None:
        drain()

    signal.signal(signal.SIGUSR2, request)


class Heartbeat:
    """A daemon thread that checks for progress once a second and reports it.

    Progress is a call of `beat` or a change of the count given to `watch`. After `stacks_seconds` without progress the
    stacks of all threads are written to standard error, by a timer that works even if Python is stuck.
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
        """Notes progress; ignores its arguments, so that it can be a callback."""
        self._beats += 1

    def watch(self, count: Callable[[], object]) -> None:
        """From now on any change of `count()`, which another thread calls, is progress."""
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
