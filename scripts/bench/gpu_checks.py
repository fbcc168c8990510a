"""Sections of `gpu.py` that ask whether the device computes what it should."""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from gpu_run import Run, timed_in_graph
from torch import nn

from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.runner.capture import Capture, CudaGraphs, capture_trace
from ds_llmpq.engine.runner.captured_decode import CapturedDecode
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import quantize_linear, quantize_rows
from ds_llmpq.quant.kernel_linear import build_linears, build_lm_head
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.linears import resolve_kernel
from ds_llmpq.quant.kernels.registry import list_candidates
from ds_llmpq.quant.packing import make_groups

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

FAMILIES = (
    "llama", "mistral-window", "qwen2", "qwen3", "opt-projected-post-norm", "bloom", "gemma2", "gemma3",
    "phi3-partial-window", "mixtral", "qwen3-moe-mixed",
)  # fmt: skip
CAPTURED_ON_CPU = ("llama", "gemma2", "mixtral")  # a trace takes seconds; the tests have them all
LENGTHS, DECODED = (3, 9, 1, 12), 6  # prompts, and decode steps after them
FLOAT32_ERROR = 1e-4
KERNEL_ROWS, KERNEL_ROWS_TINY = (1, 8, 16, 32, 64, 128, 256, 1024), (1, 16)
WIDTHS, LM_HEAD_WIDTHS, LM_HEAD_ROWS = (4, 8, 3, 2), (4, 8), (1, 64)
CACHED_BYTES = 4e8  # several times what the caches of a GPU hold
KERNEL_ERROR = 0.02  # of a product's norm: sums in 16 bits, and inputs rounded to 8 bits by OpenVINO


class Layers(nn.Module):
    """Pipeline layers one after another, as a stage has them."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, step: Step) -> Step:
        for part in self.parts:
            step = part(step)
        return step


def capture_on(device: torch.device) -> Capture:
    return CudaGraphs(device) if device.type == "cuda" else capture_trace


@torch.no_grad()
def check_families(run: Run) -> None:
    """Every family, tiny, against transformers: logits of prefill and of decode steps, eager and captured."""
    for captured in (False, True):
        how = "captured" if captured else "eager"
        names = CAPTURED_ON_CPU if captured and not run.on_gpu else FAMILIES
        for name in run.points(f"families, {how}", list(names)):
            try:
                _check_family(run, name, captured)
            except Exception as error:
                run.check(f"{name}, {how}", False, error=f"{type(error).__name__}: {error}"[:300])


def _check_family(run: Run, name: str, captured: bool) -> None:
    from tiny_models import VOCABULARY, our_model, transformers_model

    theirs = transformers_model(name)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = our_model(Path(folder))
    numbers = random.Random(1)
    rows = [[numbers.randrange(3, VOCABULARY) for _ in range(length + DECODED)] for length in LENGTHS]
    wanted = [theirs(torch.tensor([row])).logits[0] for row in rows]
    for dtype in (torch.float32, torch.bfloat16):
        module = copy.deepcopy(Layers([ours.embedding, *ours.layers, ours.head])).to(run.device, dtype)
        found = _logits(run, module, ours.decoder, rows, dtype, captured)
        error = _error(found, wanted)
        if dtype == torch.float32:
            limit = FLOAT32_ERROR
        else:
            low = copy.deepcopy(theirs).to(run.device, dtype)
            own = [low(torch.tensor([row], device=run.device)).logits[0] for row in rows]
            limit = 2 * _error(own, wanted) + 0.01
        what = f"{name}, {'captured' if captured else 'eager'}, {str(dtype).removeprefix('torch.')}"
        run.check(what, error <= limit, error=error, limit=limit)


def _logits(
    run: Run, module: nn.Module, decoder: object, rows: list[list[int]], dtype: torch.dtype, captured: bool
) -> list[torch.Tensor]:
    """[1 + DECODED, vocabulary] of each row: of its prompt's last token, and of each token behind it."""
    spec, capacity = decoder.spec.attention, max(map(len, rows))
    layers, count = len(module.parts) - 2, len(rows)
    store = KVStore(0, layers, count * capacity, spec.kv_heads, spec.head_dim, dtype, run.device)
    store.shape_for(count, capacity)
    positional = decoder.positions(run.device)
    longest = max(LENGTHS)
    padded = [row[:length] + [3] * (longest - length) for row, length in zip(rows, LENGTHS, strict=True)]
    step = Step(
        torch.arange(longest, device=run.device).expand(count, longest),
        store.prefill(range(count)),
        longest,
        True,
        token_ids=torch.tensor(padded, device=run.device),
        last=torch.tensor([length - 1 for length in LENGTHS], device=run.device),
        prepare=positional,
    )
    found = [module(step).logits.float().cpu()]
    runner = CapturedDecode(module, store, positional, capture_on(run.device), dtype) if captured else None
    for place in range(DECODED):
        at = torch.tensor([length + place for length in LENGTHS], device=run.device)
        tokens = torch.tensor([[row[length + place]] for row, length in zip(rows, LENGTHS, strict=True)])
        seen = longest + place + 1
        step = Step(
            at[:, None], store.decode(0, count, at, seen), seen, False, tokens.to(run.device), prepare=positional
        )
        logits = runner.run(step)[1] if runner else module(step).logits
        found.append(logits.reshape(count, -1).float().cpu())
    return list(torch.stack(found, 1))


def _error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of the logits from the prompts' last tokens on: the difference's norm over the reference's."""
    pairs = [
        (mine.float().cpu()[-(DECODED + 1) :], theirs[length - 1 : length + DECODED])
        for mine, theirs, length in zip(found, wanted, LENGTHS, strict=True)
    ]
    difference = sum(float((mine - theirs).square().sum()) for mine, theirs in pairs)
    return (difference / sum(float(theirs.square().sum()) for _, theirs in pairs)) ** 0.5


@torch.no_grad()
def check_kernels(run: Run) -> None:
    """Each kernel that can run here against HQQ's dequantized weight, and its speed against an unquantized product."""
    out, into = (512, 256) if run.tiny else (28672, 4096)
    quant, groups = QuantConfig(optimize=False), make_groups(QuantConfig())
    kernels = list_candidates(run.device.type, "bfloat16", quant)
    kernels = [kernel for kernel in kernels if not kernel.whole_stage]
    vocabulary = 1000 if run.tiny else 128256
    for kernel in kernels:
        if type(kernel).compile_products is Kernel.compile_products:
            continue  # nothing to compile
        wanted = [(out, into, bits) for bits in WIDTHS] + [(vocabulary, into, bits) for bits in LM_HEAD_WIDTHS]
        wanted = [each for each in wanted if resolve_kernel(kernel, *each, groups) is kernel]
        began = time.monotonic()
        try:
            kernel.compile_products(wanted, quant.group_size, run.dtype, print)
            run.add(f"{kernel.name}: compile", shapes=len(wanted), seconds=time.monotonic() - began)
        except Exception as error:
            run.check(f"{kernel.name}: compile", False, error=f"{type(error).__name__}: {error}"[:300])
    weight = torch.randn(out, into, device=run.device, dtype=run.dtype) * into**-0.5
    # several weights, here and below, so that none is found in a cache
    copies = 1 if run.tiny else max(1, int(CACHED_BYTES / weight.nbytes)) + 1
    weights = [weight, *(torch.randn_like(weight) for _ in range(copies - 1))]
    all_rows = KERNEL_ROWS_TINY if run.tiny else KERNEL_ROWS
    inputs = {rows: torch.randn(rows, into, device=run.device, dtype=run.dtype) for rows in all_rows}
    plain = {}
    for rows in run.points("unquantized product", list(all_rows)):
        turn = iter(range(1 << 40))
        plain[rows] = timed_in_graph(run, lambda: nn.functional.linear(inputs[rows], weights[next(turn) % copies]))  # noqa: B023
        run.add(f"bfloat16 {out} x {into}", rows=rows, us=1e6 * plain[rows], gb_s=weight.nbytes / plain[rows] / 1e9)
    pairs = [(kernel, bits) for bits in WIDTHS for kernel in kernels]
    for kernel, bits in run.points("kernels", pairs):
        name = kernel.name
        exact = quantize_linear(weight, None, bits, quant, torch.float32, run.device)
        reference = exact.dequantize().float()
        try:
            if resolve_kernel(kernel, out, into, bits, groups) is not kernel:
                continue
            if kernel is DEQUANTIZE:
                product = quantize_linear(weight, None, bits, quant, run.dtype, run.device)
            else:
                [product] = build_linears(kernel, [exact], bits, groups, run.dtype)
            times = 0 if run.tiny or kernel is DEQUANTIZE else int(CACHED_BYTES / product.held_bytes)
            alike = [build_linears(kernel, [exact], bits, groups, run.dtype)[0] for _ in range(times)]
            for rows in run.points(f"{name} {bits} bits", list(plain)):
                wanted = inputs[rows].float() @ reference.T
                error = float((product(inputs[rows]).float() - wanted).norm() / wanted.norm())
                seconds = timed_in_graph(run, partial(_take_turns, cycle([product, *alike]), inputs[rows]))
                run.check(
                    f"{name} {bits} bits", error <= KERNEL_ERROR, rows=rows, error=error, us=1e6 * seconds,
                    times_as_fast=plain[rows] / seconds,
                )  # fmt: skip
        except Exception as error:
            run.check(f"{name} {bits} bits", False, error=f"{type(error).__name__}: {error}"[:300])
    for kernel, bits in run.points("lm_head", [(kernel, bits) for bits in LM_HEAD_WIDTHS for kernel in kernels]):
        try:
            _check_lm_head(run, kernel, bits, vocabulary, into)
        except Exception as error:
            run.check(f"lm_head, {kernel.name} {bits} bits", False, error=f"{type(error).__name__}: {error}"[:300])


def _take_turns(products: Iterator[Callable], inputs: torch.Tensor) -> torch.Tensor:
    return next(products)(inputs)


def _check_lm_head(run: Run, kernel: Kernel, bits: int, vocabulary: int, into: int) -> None:
    """As `check_kernels`, a whole vocabulary at once."""
    quant, groups = QuantConfig(optimize=False), make_groups(QuantConfig())
    if kernel is not DEQUANTIZE and resolve_kernel(kernel, vocabulary, into, bits, groups) is not kernel:
        return
    weight = torch.randn(vocabulary, into, device=run.device, dtype=run.dtype) * into**-0.5
    dtype = run.dtype if kernel is DEQUANTIZE else torch.float32
    blocks = quantize_rows(weight, bits, quant, dtype, run.device)
    head = build_lm_head(kernel, blocks, bits, groups, run.dtype)
    for rows in run.points(f"lm_head, {kernel.name} {bits} bits", list(LM_HEAD_ROWS)):
        inputs = torch.randn(rows, into, device=run.device, dtype=run.dtype)
        wanted = torch.cat([inputs.float() @ block.dequantize().float().T for block in blocks], 1)
        error = float((head(inputs).float() - wanted).norm() / wanted.norm())
        plain = timed_in_graph(run, partial(nn.functional.linear, inputs, weight), 5)
        seconds = timed_in_graph(run, partial(head, inputs), 5)
        run.check(
            f"lm_head, {kernel.name} {bits} bits", error <= KERNEL_ERROR, rows=rows, error=error, us=1e6 * seconds,
            times_as_fast=plain / seconds,
        )  # fmt: skip
