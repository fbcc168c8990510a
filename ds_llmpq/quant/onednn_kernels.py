"""How many of its kernels oneDNN keeps in a CPU stage of torch operations, and their bytes. Imports no torch, which
reads the bounds when it multiplies for the first time.

In bfloat16 oneDNN makes kernels for each shape of a product: for a linear at each number of rows, for attention behind
a prefix at each number of rows and each length. oneDNN's cache holds them, and torch has another for those used last;
what neither holds is freed. By default they have room for 1,024 each, which no batch fills: a stage would grow for as
long as it meets new shapes. To make the kernels of a product once more takes 0.1 to 0.3 ms.
"""

from __future__ import annotations

import os

from ds_llmpq.quant.kernels.registry import find_stage_kernel

# Room in oneDNN's cache, where a product takes two places: for the products of some decode passes and of some prompts.
# In torch's, which saves a tenth of small products' time: for those of one layer.
_BOUNDS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 64, "LRU_CACHE_CAPACITY": 8}
# Of all that these hold, with what the C library keeps of freed ones. Measured: 0.293 MiB for each place in oneDNN's
# and 0.55 in torch's, whatever the products' shapes and the number of threads, so 23.2 at most; with what was freed 35
# to 36 on stages that serve chats, and 58 in a process that does nothing but meet new shapes.
KEPT_BYTES = 40 << 20


def bound_caches(kernel: str) -> None:
    """Of this process, unless the user has set other bounds. Not where the named kernel runs a stage as one graph: its
    library reads one of the bounds too."""
    if find_stage_kernel(kernel).whole_stage:
        return
    for name, room in _BOUNDS.items():
        os.environ.setdefault(name, str(room))
