"""The engine on a CUDA device that exists in name only (`fake_cuda`): every family, each dtype of GPUs, captured or
not, on each kind of stage. Nothing but what a GPU would do without waiting for the host."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from fake_cuda import CUDA, Refused, fake_cuda
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)

from ds_llmpq.engine import pipeline_engine
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.paged_cache import PagedKVStore
from ds_llmpq.engine.pipeline_engine import InferencePipelineEngine
from ds_llmpq.engine.sampling import NO_DEFAULTS
from ds_llmpq.engine.trace import Trace
from ds_llmpq.models.block import Block, Experts
from ds_llmpq.models.decoder import Decoder
from ds_llmpq.models.description import read_description
from ds_llmpq.models.ends import Head
from ds_llmpq.models.generation import Generation
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import restore_linear
from ds_llmpq.quant.kernel_linear import build_linears, build_lm_head
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.humming import HUMMING
from ds_llmpq.quant.kernels.linears import group_linears
from ds_llmpq.quant.packing import Groups
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

sys.path += [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parents[1] / "quant")]
import fake_humming
from tiny_models import _SIZES, LAYERS, MODELS, VOCABULARY, Stage

HIDDEN = 64
SLOTS, CAPACITY, PREFIX, BLOCK = 4, 40, (5, 9, 4, 8, 7, 11), 8
# of each family one; all others are slow tests
KINDS = [
    "llama", "mistral-window", "qwen2-window", "qwen3", "opt-projected-post-norm", "bloom", "gemma2", "gemma3",
    "phi3-long", "mixtral", "qwen3-moe-mixed",
]  # fmt: skip
RUN_STREAM = torch.no_grad()(InferencePipelineEngine.run_stream.__wrapped__)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("config")
            model_type, fields = MODELS[name]
            transformers.AutoConfig.for_model(model_type, **_SIZES | fields).save_pretrained(folder)
            made[name] = Decoder(read_description(folder))
        return made[name]

    return get


class PipelineStage(Stage):
    """As far as DeepSpeed's engine asks."""

    def mpu(self):
        return None


class Activations:
    """Hidden states come and go."""

    def __init__(self, dtype):
        self.dtype = dtype

    def post_receive(self, batch, shape):
        self.shape = shape

    def wait(self, batch):
        return torch.zeros(self.shape, dtype=self.dtype, device=CUDA)

    def send(self, hidden):
        assert hidden.is_cuda
        assert hidden.dtype == self.dtype

    def flush(self):
        pass


class Tokens:
    """Those of the last stage, on the others: every row chose token 1, and ends with its fourth."""

    def __init__(self):
        self.posted = []
        self.counts = {}

    def send(self, tokens, finish):
        assert not tokens.is_cuda

    def post_receive(self, batch):
        self.posted.append(batch)

    def receive(self, wait):
        if not self.posted:
            return None
        batch = self.posted.pop(0)
        if batch.phase == "prefill":
            self.counts |= dict.fromkeys(batch.slots, 0)
        self.counts |= {slot: self.counts.get(slot, 0) + 1 for slot in batch.live}
        ends = [Finish.LENGTH if self.counts[slot] >= 4 else Finish.RUNNING for slot in batch.slots]
        return batch, [1] * batch.size, [*map(int, ends)]

    def flush(self):
        pass


class LengthRule:
    def begin(self, slot, row):
        self.most = {**getattr(self, "most", {}), slot: row.max_tokens}

    def __call__(self, slot, token, generated):
        return Finish.LENGTH if generated >= self.most[slot] else Finish.RUNNING


def make_engine(
    monkeypatch, watch, decoder, dtype, place="whole", captured=True, defaults=NO_DEFAULTS, quantize=None, blocks=0
):  # fmt: skip
    """A rank of its own: all of a model, its first part, its middle or its end. `blocks`: of the cache, which rows
    share; 0: they have slots of their own."""
    first, last = place in ("whole", "first"), place in ("whole", "last")
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with CUDA:
        parts = [decoder.embedding()] if first else []
        parts += [decoder.layer(index) for index in range(LAYERS)]
        parts += [decoder.head()] if last else []
    torch.set_default_dtype(standard)
    for part in parts if quantize else ():
        quantize(decoder, part)
    module = PipelineStage(*parts).eval().requires_grad_(False)

    def begin(engine, model, **_):
        nn.Module.__init__(engine)
        engine.module, engine.device = model, CUDA
        engine.num_stages = 1 if place == "whole" else 3
        engine.stage_id = {"whole": 0, "first": 0, "middle": 1, "last": 2}[place]

    # chosen one by one they are found on the host, which prefill bears
    monkeypatch.setattr(Experts, "static", property(lambda _: True, lambda *_: None), raising=False)
    monkeypatch.setattr(pipeline_engine.PipelineEngine, "__init__", begin)
    monkeypatch.setattr(pipeline_engine.PipelineEngine, "_reserve_pipe_buffers", lambda *_: None)
    monkeypatch.setattr(pipeline_engine, "DeepSpeedConfig", lambda *_: None)
    # in inference mode composite operators would pass whole
    monkeypatch.setattr(InferencePipelineEngine, "run_stream", RUN_STREAM)
    spec = decoder.spec.attention
    sizes = spec.kv_heads, spec.head_dim, dtype, CUDA
    store = KVStore(0, LAYERS, SLOTS * CAPACITY + len(PREFIX), *sizes)
    if blocks:
        store = PagedKVStore(0, LAYERS, blocks * BLOCK, *sizes, BLOCK)

    def capture(function, buffers):
        with watch.capturing():
            outputs = function(*buffers)
        return lambda: outputs

    with watch.copying():
        positional = decoder.positions(CUDA)
    engine = InferencePipelineEngine(
        module, store, positional, Activations(dtype), Tokens(), LengthRule() if last else None,
        Trace(0, torch.device("cpu")), dtype, HIDDEN, defaults=defaults, capture=capture if captured else None,
    )  # fmt: skip
    engine.captures = captured
    return engine


def run(engine, sampling=(GREEDY,), prefix=()):
    """Six requests of unequal lengths through four slots; two in three begin with the prefix."""
    dice = random.Random(1)
    blocks = engine.store.capacity // BLOCK if isinstance(engine.store, PagedKVStore) else 0
    limits = MicroBatchLimits(
        2, 16, SLOTS, patience_rounds=1, row_buckets=True, chunked=True, cache_blocks=blocks, block_tokens=BLOCK
    )
    if prefix:
        engine.share_prefix(prefix, limits)
        assert engine.prefix == prefix
        limits = replace(limits, cache_blocks=engine.store.capacity // BLOCK if blocks else 0)
    rows = tuple(
        Sequence(
            key, (*prefix[: 100 * (key % 3)], *(dice.randrange(3, VOCABULARY) for _ in range(dice.randint(1, 20)))),
            dice.randint(2, 5), sampling[key % len(sampling)],
        )
        for key in range(6)
    )  # fmt: skip
    done = []
    engine.run_stream(
        RequestGroup(rows, SLOTS, engine.store.capacity if blocks else CAPACITY, joins=True), limits, lambda: None,
        lambda row, tokens, finish: done.append((row.key, len(tokens), finish)),
    )  # fmt: skip
    assert not engine.faults._faults
    if engine.stage_id == engine.num_stages - 1:
        assert sorted(done) == [(row.key, row.max_tokens, Finish.LENGTH) for row in rows]
    assert engine.captures == (engine.passes.captured is not None and engine.passes.captured.graphs > 0)


def pick_families():
    for name in sorted(MODELS):
        marks = () if name in KINDS else (pytest.mark.slow,)
        yield pytest.param(name, torch.bfloat16, marks=marks, id=name)
    for name in ("llama", "bloom", "gemma2", "mixtral"):
        yield pytest.param(name, torch.float16, id=f"{name}, float16")


@pytest.mark.parametrize(("name", "dtype"), [*pick_families()])
def test_families(decoders, monkeypatch, name, dtype):
    with fake_cuda(monkeypatch, dtype) as watch:
        engine = make_engine(monkeypatch, watch, decoders(name), dtype)
        run(engine)
        assert engine.ahead.used
        assert len(watch.captured) > 20 * LAYERS


@pytest.mark.parametrize("name", ["mistral-window", "bloom", "gemma2", "qwen3-moe"])
def test_a_shared_prefix(decoders, monkeypatch, name):
    with fake_cuda(monkeypatch, torch.bfloat16) as watch:
        run(make_engine(monkeypatch, watch, decoders(name), torch.bfloat16), prefix=PREFIX)


class InPlace:
    """In the place of `FlexPages`, which a compiler makes: it takes the same tensors."""

    def attend(self, query, pages, layer_idx, window):
        found = pages.find_range(window)
        assert {each.dtype for each in found if each is not None} == {torch.int32}
        assert found.blocks.shape[0] == len(found.counts) == len(query)
        assert pages.store.pages(layer_idx).dtype == query.dtype
        return torch.empty_like(query)


@pytest.mark.parametrize("way", ["in place", "copied", "eager"])
@pytest.mark.parametrize(("name", "place"), [
    ("llama", "whole"), ("mistral-window", "whole"), ("bloom", "whole"), ("gemma2", "last"), ("qwen3-moe", "middle"),
    ("opt-projected-post-norm", "first"),
])  # fmt: skip
def test_pages(decoders, monkeypatch, name, place, way):
    """So few blocks that sequences are preempted, with a prefix of one block and without."""
    for prefix in ((), (*PREFIX, *PREFIX)[:BLOCK]):
        with fake_cuda(monkeypatch, torch.bfloat16) as watch:
            engine = make_engine(
                monkeypatch, watch, decoders(name), torch.bfloat16, place, way != "eager", blocks=5 + bool(prefix)
            )
            if way == "in place":
                engine.passes.captured.flex = InPlace()
            run(engine, prefix=prefix)
            assert engine.ahead is None or engine.ahead.used


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["llama", "opt-projected-post-norm"])
def test_stages(decoders, monkeypatch, name, place):
    with fake_cuda(monkeypatch, torch.bfloat16) as watch:
        run(make_engine(monkeypatch, watch, decoders(name), torch.bfloat16, place))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_eager_passes(decoders, monkeypatch, name):
    with fake_cuda(monkeypatch, torch.bfloat16) as watch:
        run(make_engine(monkeypatch, watch, decoders(name), torch.bfloat16, captured=False))


DRAWN = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3)
PENALIZED = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, min_tokens=2)
ALL_DEFAULTS = Generation(
    eos_token_ids=(2,), repetition_penalty=1.1, no_repeat_ngram_size=2, sequence_bias=(((5,), 1.0), ((5, 6), -1.0)),
    bad_words_ids=((7,), (8, 9)), min_new_tokens=2, forced_eos_token_id=(2,), suppress_tokens=(11,),
    exponential_decay_length_penalty=(1, 1.2), begin_suppress_tokens=(12,), top_h=0.5, min_p=0.1, typical_p=0.9,
    epsilon_cutoff=1e-3, eta_cutoff=1e-3,
)  # fmt: skip


@pytest.mark.parametrize("captured", [True, False])
def test_sampling(decoders, monkeypatch, captured):
    with fake_cuda(monkeypatch, torch.bfloat16) as watch:
        for sampling, defaults in (
            ((GREEDY, DRAWN), NO_DEFAULTS), ((DRAWN,), NO_DEFAULTS), ((DRAWN, PENALIZED, GREEDY), NO_DEFAULTS),
            ((GREEDY, DRAWN), ALL_DEFAULTS),
        ):  # fmt: skip
            run(
                make_engine(monkeypatch, watch, decoders("llama"), torch.bfloat16, "whole", captured, defaults),
                sampling,
            )


def hqq_linear(out, into, bits, dtype):
    """As a quantized checkpoint gives it."""
    rows = -(-out * into // 32 // {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits])
    packed = torch.zeros(rows, 32, dtype=torch.int32 if bits == 3 else torch.uint8, device=CUDA)
    scale, zero = (torch.ones(out * into // 32, 1, dtype=dtype, device=CUDA) for _ in range(2))
    parts = {"W_q": packed, "scale": scale, "zero": zero}
    return restore_linear(parts, (out, into), None, bits, QuantConfig([bits], 32), dtype, CUDA)


def quantize_with(kernel, bits, dtype):
    """What `LayerLoader` makes of a decoder layer, and of a head."""
    stored = dtype if kernel is DEQUANTIZE else torch.float32

    def quantize(decoder, part):
        if isinstance(part, Head):
            sizes = [part.lm_head.weight.shape] if kernel is not DEQUANTIZE else [(64, HIDDEN), (32, HIDDEN)]
            part.lm_head = build_lm_head(
                kernel, [hqq_linear(*size, bits, stored) for size in sizes], bits, Groups(32), dtype
            )
        if not isinstance(part, Block):
            return
        for group in group_linears(kernel, decoder.spec.linears(part.self_attn.index), bits, Groups(32)):
            linears = [hqq_linear(role.out_features, role.in_features, bits, stored) for role in group]
            modules = build_linears(kernel, linears, bits, Groups(32), dtype)
            for role, module in zip(group, modules, strict=True):
                part.set_submodule(role.name, module)

    return quantize


@pytest.mark.parametrize(("name", "bits"), [("llama", 8), ("llama", 3), ("mixtral", 4), ("opt", 2), ("gemma2", 1)])
def test_dequantized_weights(decoders, monkeypatch, name, bits):
    with fake_cuda(monkeypatch, torch.float16) as watch:
        quantize = quantize_with(DEQUANTIZE, bits, torch.float16)
        run(make_engine(monkeypatch, watch, decoders(name), torch.float16, quantize=quantize))


@torch.library.custom_op("ds_llmpq_tests::launch_kernel", mutates_args=())
def launch_kernel(configs: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, out: int) -> torch.Tensor:
    raise NotImplementedError


@launch_kernel.register_fake
def _(configs, inputs, weight, out):
    assert not configs.is_cuda
    assert inputs.dim() == 2
    assert inputs.is_contiguous()
    return inputs.new_empty(len(inputs), out)


@pytest.mark.parametrize(("name", "compiled"), [("qwen2", False), ("llama", True), ("phi3", False), ("mixtral", True)])
def test_humming(decoders, monkeypatch, name, compiled):
    """Its kernel is a stub. `compiled`: as one operator, as torch's compiler calls it."""
    monkeypatch.setattr(
        fake_humming, "pack_weight",
        lambda codes, bits: torch.empty(codes.shape[0], codes.shape[1] * bits // 32, dtype=torch.int32, device=CUDA),
    )  # fmt: skip
    monkeypatch.setattr(
        fake_humming, "launch_kernel",
        lambda *, configs, inputs, weight, weight_scale, zero_point, locks: launch_kernel(
            configs, inputs, weight, weight_scale.shape[1]
        ),
    )  # fmt: skip
    fake_humming.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(type(HUMMING), "takes", lambda *_: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    with fake_cuda(monkeypatch, torch.bfloat16) as watch:
        quantize = quantize_with(HUMMING, 4, torch.bfloat16)
        run(make_engine(monkeypatch, watch, decoders(name), torch.bfloat16, quantize=quantize))


def test_what_a_gpu_would_refuse_is_refused(decoders, monkeypatch):
    """What the other tests look for is found where it is."""
    with fake_cuda(monkeypatch, torch.bfloat16) as watch:
        there = torch.ones(2, 2, dtype=torch.bfloat16, device=CUDA)
        here = torch.ones(2, 2, dtype=torch.bfloat16)
        with pytest.raises(FakeTensorDeviceMismatchError):
            there + here
        for read in (there.tolist, lambda: bool(there.any()), lambda: there[0, 0].item()):
            with pytest.raises(DataDependentOutputException):
                read()
        with pytest.raises(DynamicOutputShapeException):
            there[there > 0]
        for copy in (
            lambda: there.cpu(), lambda: here.to(CUDA), lambda: there[[0, 1]], lambda: there.copy_(here),
            lambda: here.to(CUDA, non_blocking=True), lambda: there.copy_(here, non_blocking=True),
        ):  # fmt: skip
            with pytest.raises(Refused):
                copy()
        with watch.capturing():
            for unfit in (
                lambda: torch.zeros(3), lambda: torch.rand_like(there), lambda: there.float() @ there.float(),
                lambda: there.double(),
            ):  # fmt: skip
                with pytest.raises(Refused):
                    unfit()
