"""Standard streams that are closed, full or cannot show a character: no reason to end a run whose results are files."""

from __future__ import annotations

import io
import os
import sys


class _Stream(io.FileIO):
    """Drops what cannot be written, and keeps the first error."""

    failure: OSError | None = None

    def write(self, data: object) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return len(memoryview(data))


def prepare_streams() -> None:
    """Opens those that are closed, lest a file that is opened next get their number and be written to; makes
    stdout and stderr escape what their encoding lacks and outlive a full disk."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this
    sys.stdin = sys.stdin or io.StringIO()
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):  # the caller's own, as in a test
            continue
        raw = io.BufferedWriter(_Stream(number, "w", closefd=False))
        encoding = before.encoding if before else None
        whole_lines = number == 2 or raw.isatty()
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=whole_lines))


def find_lost_output() -> OSError | None:
    """Why something of stdout could not be written; None if all was."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Stream) else None
