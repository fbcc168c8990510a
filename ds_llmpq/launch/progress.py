"""Progress of a batch: a bar for people, or lines for the process that started the launcher."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from ds_llmpq.errors import UserError
from ds_llmpq.files import parse_json
from ds_llmpq.validation import Count, Label, validate

PROGRESS_MARK = "ds-llmpq progress "
ERROR_MARK = "ds-llmpq error: "
_SECONDS_BETWEEN = 0.2
_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Progress of phases on standard error: a bar on a terminal, occasional lines in a log."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._phase = ""
        self._said, self._finished = 0.0, False

    def show(self, phase: str, done: int, total: int, note: str = "") -> None:
        if not self._stream.isatty():
            self._show_line(phase, done, total, note)
            return
        if phase != self._phase:
            self.close()
            self._bar = tqdm(total=total, desc=phase, file=self._stream, dynamic_ncols=True)
            self._phase = phase
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix_str(note, refresh=False)

    def _show_line(self, phase: str, done: int, total: int, note: str) -> None:
        now, finished = time.monotonic(), done >= total
        said_enough = self._finished if finished else now - self._said < _SECONDS_BETWEEN_LINES
        if phase == self._phase and said_enough:
            return
        self._phase, self._said, self._finished = phase, now, finished
        print(f"{phase}: {done} of {total}" + (f", {note}" if note else ""), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None


class ProgressLines:
    """Progress as JSON lines for `parse_progress`; at most five a second, but always the first and last of a phase."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._last = 0.0
        self._phase = ""

    def show(self, phase: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or phase != self._phase or now - self._last > _SECONDS_BETWEEN:
            self._last, self._phase = now, phase
            fields = {"phase": phase, "done": done, "total": total, "note": note, "pid": os.getpid()}
            print(PROGRESS_MARK + json.dumps(fields), file=self._stream, flush=True)

    def close(self) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class ProgressReport:
    """The content of a progress line. `pid` is the process that wrote it."""

    phase: Label
    done: Count
    total: Count
    note: Label
    pid: Count


def parse_progress(line: str) -> ProgressReport | None:
    """The content of a progress line, None for other lines. Launchers may prefix the host's name."""
    _, mark, text = line.partition(PROGRESS_MARK)
    if not mark:
        return None
    try:
        return validate(ProgressReport, parse_json(text, "progress", ""), "progress", "")
    except UserError:  # two ranks' writes mixed, or a library printed the mark
        return None
