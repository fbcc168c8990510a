"""Decode passes over pages recorded once and replayed: the same bits as the eager pass, whichever slots take part, and
what slots of their own give. And FlexAttention over pages in place, compiled for the CPU: what copies of them give."""

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ds_llmpq.cost.captured_graphs import row_bucket
from ds_llmpq.engine.paged_cache import PagedKVStore, PageTables
from ds_llmpq.engine.runner.capture import capture_trace
from ds_llmpq.engine.runner.captured_pages import CapturedPages
from ds_llmpq.engine.runner.flex_pages import FlexPages, attend_in_place
from ds_llmpq.models.block import attend
from ds_llmpq.models.step import Step
from ds_llmpq.quant.kernels.base import SHARED_BLOCK

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_captured_decode import KINDS, eager, models  # noqa: F401 -- a fixture
from tiny_models import LAYERS, VOCABULARY, Stage, decode_step

BLOCKS, SLOTS, BUCKET = 24, 5, 128
PREFIX = tuple(range(5, 5 + SHARED_BLOCK))
LENGTHS = (3, 24, 31, 1, 57)  # of prompts: next tokens begin blocks, end them and stand within; OPT has 64 positions
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or not torch.cpu._is_avx2_supported(), reason="needs a C++ compiler and AVX2"
)


class Rows:
    """Prompts in a store of pages, whose blocks lie anywhere, and in one of slots; some begin with a prefix."""

    def __init__(self, ours, seed, prefix=()):
        numbers = random.Random(seed)
        spec = ours.decoder.spec.attention
        shape = LAYERS, (BLOCKS + len(prefix) // SHARED_BLOCK) * SHARED_BLOCK, spec.kv_heads, spec.head_dim
        self.pages = PagedKVStore(0, *shape, torch.float32, torch.device("cpu"), SHARED_BLOCK)
        self.slots = ours.store(SLOTS, len(prefix) + 4 * SHARED_BLOCK)
        if prefix:
            self.pages.tables = [[*range(len(prefix) // SHARED_BLOCK)]]
            ours.prefill([list(prefix)], self.pages)
        self.pages.hold_prefix(len(prefix))
        self.pages.shape_for(SLOTS, 0)
        blocks = numbers.sample(range(BLOCKS), BLOCKS)
        self.pages.tables = [[blocks.pop() for _ in range(4)] for _ in range(SLOTS)]
        self.shared = [len(prefix) * (slot % 2) for slot in range(SLOTS)]
        self.at = []
        for slot, length in enumerate(LENGTHS):
            own = [numbers.randrange(3, VOCABULARY) for _ in range(length)]
            before = list(prefix[: self.shared[slot]])
            ours.prefill([before + own], self.slots, [slot])
            ours.prefill([own], self.pages, [slot], len(before))
            self.at.append(len(before) + length)

    def step(self, slots, tokens, padded=0):
        at = torch.tensor([self.at[slot] for slot in slots])
        cache = self.pages.decode_rows(slots, at.tolist(), [self.shared[slot] for slot in slots], at)
        seen = max(at.tolist()) + 1
        if padded:
            tables = torch.tensor(self.pages.tabulate(cache.places, padded))
            cache, seen = PageTables(self.pages, tables, at, padded), padded
        return Step(at[:, None], cache, seen, False, token_ids=torch.tensor(tokens)[:, None])


@pytest.mark.parametrize(("name", "prefix"), [*((name, ()) for name in KINDS), ("llama", PREFIX), ("bloom", PREFIX)])
def test_a_replayed_pass_over_pages_has_the_bits_of_the_eager_one(models, name, prefix):  # noqa: F811
    ours = models(name)
    module, positional = Stage(ours.embedding, *ours.layers, ours.head), ours.decoder.positions()
    captured, plain = Rows(ours, 1, prefix), Rows(ours, 1, prefix)
    runner = CapturedPages(module, captured.pages, positional, capture_trace, torch.float32)
    numbers = random.Random(2)
    for taking in ((0, 1, 2, 3, 4), (4, 1, 3), (2, 4, 0), (3, 0, 4, 1), (0, 1, 2)):
        tokens = [numbers.randrange(3, VOCABULARY) for _ in taking]
        _, logits = runner.run(captured.step(taking, tokens))
        ours.set_static()  # in what order experts are summed shows in the last bits
        more = min(row_bucket(len(taking)), SLOTS) - len(taking)
        filled = plain.step([*taking, *taking[:1] * more], tokens + tokens[:1] * more, BUCKET)
        _, expected = eager(module, positional, filled)
        assert torch.equal(logits, expected[: len(taking)])
        assert torch.equal(captured.pages.memory, plain.pages.memory)
        for row, slot in enumerate(taking):
            at = captured.at[slot]
            _, alone = eager(module, positional, decode_step(captured.slots, slot, tokens[row : row + 1], [at], at + 1))
            assert torch.allclose(logits[row], alone[0], atol=1e-4)
            captured.at[slot] = plain.at[slot] = at + 1
    assert runner.graphs == 2  # of 4 and 5 rows


@needs_compiler
def test_attention_in_place_is_attention_over_copies():
    """A window, a soft cap and a bias by position at once, over groups of heads."""
    torch.manual_seed(0)
    rows, heads, groups, size, window = 4, 6, 2, 24, 40
    store = PagedKVStore(0, 1, 40 * SHARED_BLOCK, groups, size, torch.float32, torch.device("cpu"), SHARED_BLOCK)
    store.memory.copy_(torch.randn(store.memory.shape))
    at = torch.tensor([0, 31, 32, 150])
    tables = torch.randperm(40, dtype=torch.int32)[: 4 * 5].view(4, 5)
    wide = torch.zeros(4, 64, dtype=torch.int32)
    wide[:, :5] = tables
    pages, copied = PageTables(store, wide, at, 0), store.gather(0, tables, 160)
    query, slopes = torch.randn(rows, heads, 1, size), torch.rand(heads)
    compiled = torch.compile(attend_in_place, fullgraph=True, dynamic=False)
    keys = torch.arange(160)
    for width in (window, None):
        seen = keys <= at[:, None]
        if width is not None:
            seen &= keys > at[:, None] - width
        with torch.inference_mode():
            args = pages.find_range(width), slopes, 0.3, 1.5, SHARED_BLOCK
            found = compiled(query.view(rows, groups, 3, size), *store.pages(0), *args).view(query.shape)
        scores = query @ copied[0].repeat_interleave(heads // groups, 1).transpose(2, 3) * 0.3
        scores = 1.5 * torch.tanh(scores / 1.5) + slopes[:, None, None] * keys
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        assert torch.allclose(found, weights @ copied[1].repeat_interleave(heads // groups, 1), atol=1e-5)
    plain = attend(query, *copied, (keys <= at[:, None])[:, None, None], 0.3)
    with torch.inference_mode():
        args = pages.find_range(None), None, 0.3, None, SHARED_BLOCK
        found = compiled(query.view(rows, groups, 3, size), *store.pages(0), *args)
    assert torch.allclose(found.view(query.shape), plain, atol=1e-5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral-window", "bloom", "gemma2", "gemma3", "opt-projected-post-norm"])
def test_families_read_pages_in_place(models, name):  # noqa: F811
    ours = models(name)
    module, positional = Stage(ours.embedding, *ours.layers, ours.head), ours.decoder.positions()
    rows, copied = Rows(ours, 1), Rows(ours, 1)
    runner = CapturedPages(module, rows.pages, positional, lambda run, buffers: lambda: run(*buffers), torch.float32)
    runner.flex, said = FlexPages(ours.decoder.spec, torch.device("cpu")), []
    assert runner.flex.check(rows.pages, 4, said.append), said
    with torch.inference_mode():
        for taking in ((4, 1, 3), (2, 3, 0), (0, 1, 2, 4)):
            tokens = [5 + slot for slot in taking]
            _, found = runner.run(rows.step(taking, tokens))
            _, expected = eager(module, positional, copied.step(taking, tokens, BUCKET))
            assert torch.allclose(found, expected, atol=1e-4)
            for slot in taking:
                rows.at[slot] = copied.at[slot] = rows.at[slot] + 1


def test_what_does_not_compile_is_said_once(models, monkeypatch):  # noqa: F811
    ours, said = models("llama"), []
    flex = FlexPages(ours.decoder.spec, torch.device("cpu"))

    def fail(*_):
        raise RuntimeError("no compiler\nand so on")

    flex._attend = fail
    assert not flex.check(Rows(ours, 1).pages, 4, said.append)
    [line] = said
    assert "copies the pages of the KV cache in every pass" in line
    assert "RuntimeError: no compiler)" in line
