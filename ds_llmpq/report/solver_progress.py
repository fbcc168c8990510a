"""Prints the solver's progress on standard error if a solve takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from ds_llmpq.planner import ProgressEvent
from ds_llmpq.wording import format_number

_PATIENCE_SECONDS = 2.0
_SECONDS_BETWEEN = 1.0


def make_progress_callback(stream: TextIO | None = None) -> Callable[[ProgressEvent], None]:
    """A callback for `solve` that prints at most one line a second, and none in the first two."""
    said = 0.0

    def show(event: ProgressEvent) -> None:
        nonlocal said
        if event.seconds < max(_PATIENCE_SECONDS, said + _SECONDS_BETWEEN):
            return
        said = event.seconds
        gap = "nothing proven yet" if event.gap is None else f"gap {100 * event.gap:.2f} %"
        print(
            f"planning {event.seconds:.0f} s: best {_number(event.incumbent)}, bound {_number(event.bound)}, {gap}",
            file=stream or sys.stderr,
        )

    return show


def _number(value: float | None) -> str:
    return "none" if value is None else format_number(value, 5)
