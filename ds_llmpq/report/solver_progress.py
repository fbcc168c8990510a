"""Prints the solver's progress on standard error if a solve takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ds_llmpq.planner import ProgressEvent
from ds_llmpq.wording import format_number

_PATIENCE_SECONDS = 2.0
_SECONDS_BETWEEN = 1.0


def make_progress_callback() -> Callable[[ProgressEvent], None]:
    """A callback for `solve` that prints at most one line a second, and none in the first two."""
    said = 0.0

    def show(event: ProgressEvent) -> None:
        nonlocal said
        if event.seconds < max(_PATIENCE_SECONDS, said + _SECONDS_BETWEEN):
            return
        said = event.seconds
        best, bound = ("none" if x is None else format_number(x, 5) for x in (event.incumbent, event.bound))
        gap = "nothing proven yet" if event.gap is None else f"gap {100 * event.gap:.2f} %"
        print(f"planning {event.seconds:.0f} s: best {best}, bound {bound}, {gap}", file=sys.stderr)

    return show
