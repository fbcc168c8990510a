"""`ds-llmpq plan` with a line of JSON for each of the planner's events instead of its own: seconds since START (as
`time.time()` has it), objective, bound. Nothing is imported before the command itself does it.

    python scripts/bench/plan_events.py START key=value ...
"""

import importlib
import json
import sys
import time
from types import ModuleType
from typing import Any

from ds_llmpq import cli

import_module = importlib.import_module


def note(event: Any) -> None:
    print(json.dumps([time.time() - float(sys.argv[1]), event.incumbent, event.bound or 0.0]), file=sys.stderr)


def import_and_replace(name: str, package: str | None = None) -> ModuleType:
    module = import_module(name, package)
    if name == "ds_llmpq.commands.plan":
        module.make_progress_callback = lambda: note
    return module


if __name__ == "__main__":
    importlib.import_module = import_and_replace
    cli.main(["plan", *sys.argv[2:]])
