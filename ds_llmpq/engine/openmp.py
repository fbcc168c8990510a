"""How long threads of GNU OpenMP, under torch on Linux, stay awake for the next product. Imports no torch, which reads
it once, when it is imported.

Left alone they wait for over 8 ms. Where other programs have a processor too, the thread that they wait for stands
still meanwhile, and so would a kernel's own threads: decode then takes many times as long. For about 0.1 ms they cost
next to nothing on a quiet machine. docs/decisions.md has the measurements.
"""

from __future__ import annotations

import os

VARIABLE, _BRIEFLY = "GOMP_SPINCOUNT", "3000"


def wait_briefly() -> None:
    """Unless the user has said how long."""
    os.environ.setdefault(VARIABLE, _BRIEFLY)
