"""HQQ without the compiler's backend: whoever imports it first, and torch.compile as it was afterwards."""

import json
import subprocess
import sys

import pytest
import torch

from ds_llmpq.quick_imports import without_compiling


@pytest.mark.parametrize("first", ["hqq.core.quantize", "transformers.cache_utils"])
def test_hqq_comes_without_the_compiler_and_torch_compile_stays(first):
    code = f"""
import importlib, json, sys
import ds_llmpq, torch
before = torch.compile
importlib.import_module({first!r})
import hqq.core.quantize as hqq
print(json.dumps([torch.compile is before, "torch._inductor.compile_fx" in sys.modules,
                  "hqq.core.quantize" in sys.modules, hqq.HQQLinear.forward_pytorch_compile.__name__]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == [True, False, True, "forward_pytorch_compile"]


def fail_inside():
    with without_compiling():

        @torch.compile
        def plain():
            return 1

        @torch.compile(fullgraph=True)
        def optioned():
            return 2

        assert (plain(), optioned()) == (1, 2)
        raise ZeroDivisionError


def test_torch_compile_comes_back_after_a_failure():
    before = torch.compile
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert torch.compile is before
