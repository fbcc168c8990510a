"""Sections of `gpu.py`: a KV cache that sequences share, read in place, beside slots: is it right, is it faster."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from gpu_batches import MIXES, MIXES_TINY, plan_for, run_batch
from gpu_checks import FLOAT32_ERROR, Layers, capture_on
from gpu_run import Run, free, timed
from gpu_speed import make_store

from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.paged_cache import PagedKVStore
from ds_llmpq.engine.runner.captured_decode import CapturedDecode
from ds_llmpq.engine.runner.captured_pages import CapturedPages
from ds_llmpq.engine.runner.flex_pages import FlexPages
from ds_llmpq.engine.runner.fusion import has_compiler
from ds_llmpq.models.decoder import Decoder
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.models.step import Step
from ds_llmpq.quant.kernels.base import SHARED_BLOCK

FAMILIES = ("llama", "mistral-window", "bloom", "gemma2", "gemma3")
LENGTHS = (40, 1, 70, 32, 95)
# rows, longest context, positions of a block; contexts are spread evenly from a quarter of the longest on
POINTS = [(64, 512, 32), (256, 512, 32), (16, 2048, 32), (1, 512, 32), (256, 512, 64), (256, 512, 128), (16, 2048, 128)]
COPIED = (64, 512, 32)  # at which passes that copy pages are timed too
BATCH_SLOTS, BATCH_ROWS, BATCH_REQUESTS = 64, 256, 400


def make_pages(
    shape: tuple[int, int, int], contexts: Sequence[int], block: int, dtype: torch.dtype, device: torch.device
) -> PagedKVStore:
    """`shape`: layers, key/value heads, size of a head. A row for each context, its blocks anywhere in the store."""
    needed = [-(-context // block) for context in contexts]
    layers, heads, size = shape
    store = PagedKVStore(0, layers, sum(needed) * block, heads, size, dtype, device, block)
    blocks = random.Random(0).sample(range(sum(needed)), sum(needed))
    store.tables = [[blocks.pop() for _ in range(count)] for count in needed]
    store.shape_for(len(needed), 0)
    return store


def step_over(store: PagedKVStore, contexts: Sequence[int], tokens: torch.Tensor, positional: object) -> Step:
    at = torch.tensor([context - 1 for context in contexts], device=store.device)
    cache = store.decode_rows(range(len(contexts)), [context - 1 for context in contexts], [0] * len(contexts), at)
    return Step(at[:, None], cache, max(contexts), False, token_ids=tokens, prepare=positional)


def read_in_place(run: Run, runner: CapturedPages, decoder: Decoder, rows: int) -> bool:
    """Only compiled for GPUs: elsewhere pages are copied."""
    if not run.on_gpu or not has_compiler(run.device):
        return False
    flex = FlexPages(decoder.spec, run.device)
    runner.flex = flex if flex.check(runner.store, rows, print) else None
    run.add("compile attention over pages", rows=rows, seconds=flex.compile_seconds)
    return runner.flex is not None


@torch.no_grad()
def check_pages(run: Run) -> None:
    """A decode step over pages of each kind of attention, tiny, against transformers."""
    from tiny_models import VOCABULARY, our_model, transformers_model

    for name in run.points("pages", list(FAMILIES[: 2 if run.tiny else None])):
        theirs, numbers = transformers_model(name), random.Random(1)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = our_model(Path(folder))
        rows = [[numbers.randrange(3, VOCABULARY) for _ in range(min(length, 60))] for length in LENGTHS]
        module = copy.deepcopy(Layers([ours.embedding, *ours.layers, ours.head])).to(run.device)
        spec, contexts = ours.decoder.spec, list(map(len, rows))
        sizes = len(ours.layers), spec.attention.kv_heads, spec.attention.head_dim
        store = make_pages(sizes, contexts, SHARED_BLOCK, torch.float32, run.device)
        positional = ours.decoder.positions(run.device)
        for slot, row in enumerate(rows):
            ids = torch.tensor([row], device=run.device)
            at = torch.arange(len(row), device=run.device)[None]
            module(Step(at, store.prefill([slot]), len(row), True, token_ids=ids, prepare=positional))
        runner = CapturedPages(module, store, positional, capture_on(run.device), torch.float32)
        in_place = read_in_place(run, runner, ours.decoder, len(rows))
        tokens = torch.tensor([[row[-1]] for row in rows], device=run.device)
        found = runner.run(step_over(store, contexts, tokens, positional))[1].reshape(len(rows), -1).cpu()
        wanted = torch.stack([theirs(torch.tensor([row])).logits[0, -1] for row in rows])
        error = float((found - wanted).norm() / wanted.norm())
        run.check(f"{name}, pages", error <= FLOAT32_ERROR, error=error, limit=FLOAT32_ERROR, in_place=in_place)
        free(run.device)


def time_pages(run: Run, module: Layers, positional: object, shape: ModelShape, decoder: Decoder) -> None:
    """Captured decode steps of rows of unequal lengths: over pages in place, and over slots as long as the longest."""
    for rows, longest, block in run.points("decode over pages", [(3, 64, 32)] if run.tiny else POINTS):
        contexts = [longest - row * 3 * longest // (4 * rows) for row in range(rows)]
        slots = make_store(run, shape, rows, longest)
        if slots is None:
            continue
        tokens = torch.randint(0, shape.vocab, (rows, 1), device=run.device)
        figures = {"slots_ms": 1e3 * timed(run, _run_slots(run, module, positional, slots, contexts, tokens))}
        del slots
        free(run.device)
        pages = make_pages((shape.layers, shape.kv_heads, shape.head_dim), contexts, block, run.dtype, run.device)
        step = step_over(pages, contexts, tokens, positional)
        runner = CapturedPages(module, pages, positional, capture_on(run.device), run.dtype)
        if run.tiny or (rows, longest, block) == COPIED:
            figures["copied_ms"] = 1e3 * timed(run, partial(runner.run, step))
            runner = CapturedPages(module, pages, positional, capture_on(run.device), run.dtype)
        if read_in_place(run, runner, decoder, rows):
            figures["in_place_ms"] = 1e3 * timed(run, partial(runner.run, step))
        run.add("decode over pages", rows=rows, longest=longest, mean=sum(contexts) / rows, block=block, **figures)
        free(run.device)


def _run_slots(
    run: Run, module: Layers, positional: object, store: KVStore, contexts: Sequence[int], tokens: torch.Tensor
) -> object:
    at, longest = torch.tensor([context - 1 for context in contexts], device=run.device), max(contexts)
    cache = store.decode(0, len(contexts), at, longest)
    step = Step(at[:, None], cache, longest, False, token_ids=tokens, prepare=positional)
    return partial(CapturedDecode(module, store, positional, capture_on(run.device), run.dtype).run, step)


def run_both_caches(run: Run, folder: Path) -> None:
    """The first requests of the first mix in the memory of so many slots: with these, and with four times as many rows
    that share it."""
    name, mix = next(iter((MIXES_TINY if run.tiny else MIXES).items()))
    slots, rows, count = (2, 4, 6) if run.tiny else (BATCH_SLOTS, BATCH_ROWS, BATCH_REQUESTS)
    pool = slots * (mix[3] + mix[4])
    for what, sequences, shared in (("slots", slots, 0), ("pages", rows, pool)):
        plan = plan_for(run, folder, sequences, mix[3], mix[4], pool=shared)
        label = f"{name}, {count} requests, {what} in the same memory"
        run_batch(run, plan, folder, label, mix, run.left() * (0.5 if what == "slots" else 1), count)
        gc.collect()
        free(run.device)
