"""What oneDNN's kernels take in a process whose caches are bounded."""

import os
import subprocess
import sys

import pytest

from ds_llmpq.quant.onednn_kernels import _BOUNDS, KEPT_BYTES, bound_caches

# all kinds of products that a stage has, of more shapes than there is room for
GROWTH = """
from ds_llmpq.quant.onednn_kernels import bound_caches
bound_caches("dequantize")
import torch
from torch import nn
from ds_llmpq.engine.device_memory import held_bytes, release_freed
from ds_llmpq.models.block import attend_with_prefix
from ds_llmpq.quant.onednn_linear import OneDnnLinear, PaddedLinear

torch.set_num_threads(1)
torch.set_grad_enabled(False)
cpu = torch.device("cpu")
sizes = [(256, 256), (128, 256), (512, 256), (256, 512)]
plain = [nn.Linear(*size, dtype=torch.bfloat16) for size in sizes]
linears = [*map(OneDnnLinear, plain), *map(PaddedLinear, plain)]
inputs = {features: torch.ones(128, features, dtype=torch.bfloat16) for features in (128, 256, 512)}
query, states = torch.ones(8, 4, 1, 64).bfloat16(), torch.ones(8, 2, 256, 64).bfloat16()

def hold():
    release_freed()
    return held_bytes(cpu)

before, most = hold(), 0
for rows in range(1, 129):
    for linear, size in zip(linears, sizes * 2, strict=True):
        linear(inputs[size[0]][:rows])
    most = max(most, hold() - before)
for rows in range(1, 9):
    for length in range(32, 257, 32):
        mask = torch.ones(1, 1, 1, 32 + length, dtype=torch.bool)
        own = states[:rows, :, :length]
        attend_with_prefix(query[:rows], own, own, states[:2, :, :32], mask, 0.1)
    most = max(most, hold() - before)
print(most)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kernels_that_are_in_use_take_their_part_of_what_the_memory_model_counts():
    torch = pytest.importorskip("torch")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor's oneDNN does not compute in bfloat16")
    own = {name: value for name, value in os.environ.items() if name not in _BOUNDS}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], env=own, capture_output=True, text=True, check=True, timeout=120
    )
    assert 0.5 < float(done.stdout) / KEPT_BYTES < 0.7, "23 MiB, and what the C library keeps of freed ones"


@pytest.mark.parametrize(
    ("kernel", "expected"), [("dequantize", ["64", "9"]), ("openvino", ["64", "9"]), ("openvino_graph", [None, "9"])]
)
def test_bounds_are_for_stages_of_torch_operations_and_the_users_stay(monkeypatch, kernel, expected):
    names = list(_BOUNDS)
    monkeypatch.setenv(names[0], "")  # so that it is removed again
    monkeypatch.delenv(names[0])
    monkeypatch.setenv(names[1], "9")
    bound_caches(kernel)
    assert [os.environ.get(name) for name in names] == expected
