"""Decoder blocks compiled for decode passes, so that their small operations become few.

A captured pass costs the host one launch, but on the device each norm, rotation and activation still reads and writes
memory on its own. torch's compiler fuses what lies between the products (regional: the halves of a block before and
behind attention, once for each kind of block and any number of rows). Cache and attention stay outside, and with them
all that differs from layer to layer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ds_llmpq.models.block import Block, Experts
from ds_llmpq.models.step import Step

# the compiler takes the first for all there is, and learns from the second that rows vary: one version is for a single
# row, and one for more
ROWS = (1, 2)
_KINDS = 64  # of blocks, rows and tensors, for which there can be compiled versions; torch allows 8
_QUIET_SECONDS = 2.0


class Fusion:
    """Compiles the blocks of `module` that can be: those whose linears torch's compiler can call, and no experts.

    positional: of the stage (`Decoder.positions`). Where the compiler fails, `tell` gets a line, and blocks stay as
    they are. compile_seconds: what it took.
    """

    def __init__(
        self, module: nn.Module, positional: Callable[[Step], None], dtype: torch.dtype, device: torch.device,
        tell: Callable[[str], None],
    ):  # fmt: skip
        self.blocks = [part for part in module.modules() if isinstance(part, Block) and _can_compile(part)]
        self.compile_seconds = 0.0
        self._positional, self._dtype, self._device, self._tell = positional, dtype, device, tell
        self._halves = Block.enter, Block.leave

    def compile(self) -> None:
        """Runs every block once for each of `ROWS`, before anything is captured."""
        if not self.blocks:
            return
        began = time.monotonic()
        compiler = torch.compile(fullgraph=True)
        self._halves = compiler(Block.enter), compiler(Block.leave)
        try:
            allow_versions(_KINDS)
            with torch.inference_mode(), self.use():
                for place, block in enumerate(self.blocks, 1):
                    before = time.monotonic()
                    for rows in ROWS:
                        self._run(block, rows)
                    now = time.monotonic()
                    if now - before > _QUIET_SECONDS:
                        self._tell(f"compiled decoder block {place} of {len(self.blocks)} ({now - began:.0f} s)")
        except Exception as error:
            self.blocks = []
            said = str(error).strip().splitlines() or [""]
            self._tell(f"decoder blocks run uncompiled, which is slower ({type(error).__name__}: {said[0][:200]})")
        self.compile_seconds = time.monotonic() - began

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Blocks are compiled ones, in decode passes alone: prefill has other shapes."""
        for block in self.blocks:
            block.halves = self._halves
        try:
            yield
        finally:
            for block in self.blocks:
                block.halves = Block.enter, Block.leave

    def _run(self, block: Block, rows: int) -> None:
        hidden = torch.zeros(rows, 1, block.spec.hidden, dtype=self._dtype, device=self._device)
        positions = torch.zeros(rows, 1, dtype=torch.long, device=self._device)
        block(Step(positions, None, 1, False, hidden=hidden, prepare=self._positional))


def allow_versions(count: int) -> None:
    """So many compiled versions of a function, for good: more are met when passes are captured, such as for states that
    come from another stage, which are tensors of another kind."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def has_compiler(device: torch.device) -> bool:
    """Whether torch can compile for it: on GPUs by Triton."""
    return device.type != "cuda" or importlib.util.find_spec("triton") is not None


def _can_compile(block: Block) -> bool:
    if isinstance(block.mlp, Experts):
        return False
    linears = (block.get_submodule(linear.name) for linear in block.spec.linears(block.self_attn.index))
    return all(type(linear) is nn.Linear or getattr(linear, "compiles", False) for linear in linears)
