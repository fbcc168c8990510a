"""Sections of `gpu.py` that time: ceilings, decode and prefill by rows and bits, transformers beside them, a batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_checks import Layers, capture_on
from gpu_run import Run, free, timed, timed_in_graph
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig
from ds_llmpq.cost import products
from ds_llmpq.cost.arithmetic import attention_flops, head_flops, kv_bytes, linear_flops
from ds_llmpq.cost.latency import CAPTURED_LAUNCHES_SHARE, RooflineCosts
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.runner.captured_decode import CapturedDecode
from ds_llmpq.engine.runner.fusion import Fusion, has_compiler
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.registry import select_kernel
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import make_groups

PREDICTED = "measured; predicted: fitted to the ceilings"
FUSION_ROWS = (1, 64, 256)  # at which captured steps are timed without compiled blocks too
LAUNCHES = 64  # of the graph whose launches are timed


def measure_ceilings(run: Run) -> None:
    """What a copy, a product and a launch cost here: what all else is held against."""
    size = (1 << 24) if run.tiny else (1 << 30)
    data = torch.zeros(size, dtype=torch.uint8, device=run.device)
    other = torch.empty_like(data)
    run.rates["bytes"] = 2 * size / timed(run, lambda: other.copy_(data))
    run.add("copy", gb_s=run.rates["bytes"] / 1e9)
    side = 256 if run.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(side, side, dtype=dtype, device=run.device)
        name = str(dtype).removeprefix("torch.")
        run.rates[name] = 2 * side**3 / timed(run, lambda: matrix @ matrix)  # noqa: B023
        run.add(f"product {side}^3, {name}", tflop_s=run.rates[name] / 1e12)
    small = torch.zeros(8, device=run.device)
    run.rates["launch"] = timed_in_graph(run, lambda: small.add_(1), LAUNCHES)
    run.add("small operation in a graph", us=1e6 * run.rates["launch"])
    run.add("rates", rates=run.rates)
    run.add("small operation, eager", us=1e6 * timed(run, lambda: [small.add_(1) for _ in range(64)]) / 64)


def make_costs(run: Run, shape: ModelShape, kernel: Kernel) -> RooflineCosts:
    """The planner's cost model with the rates that were measured just now, no profile."""
    cluster = Cluster.from_config(make_cluster(run))
    return RooflineCosts(cluster.devices[0].type, shape, "bfloat16", make_groups(QuantConfig()), kernel, captured=True)


def make_cluster(run: Run) -> ClusterConfig:
    memory = torch.cuda.mem_get_info()[0] if run.on_gpu else 4 * (1 << 30)
    share = CAPTURED_LAUNCHES_SHARE if run.on_gpu else 1.0  # the launches that were timed are those of a graph
    kind = DeviceTypeConfig(
        kind=run.device.type,
        memory_bytes=int(0.95 * memory),
        memory_bandwidth_bytes_per_second=run.rates["bytes"],
        flops_per_second={name: run.rates[name] for name in ("bfloat16", "float32")},
        kernel_overhead_seconds=products.LAYER_LAUNCHES * run.rates["launch"] / share,
        bits=[2, 3, 4, 8, 16],
        source="measured by scripts/bench/gpu.py",
    )
    device = DeviceConfig("device", threads=None if run.on_gpu else 1)
    return ClusterConfig("bench", {"device": kind}, [HostConfig("localhost", [device])])


@torch.inference_mode()
def time_passes(run: Run, folder: Path, bits: int, further: Callable[..., None] | None = None) -> None:
    """Decode by rows with and without graphs, then prefill, of the whole model at one width; then what `further` does
    with it."""
    shape, checkpoint = read_shape(folder), Checkpoint(folder)
    quant = resolve_quant(run, shape)
    began = time.monotonic()
    loader = LayerLoader(
        checkpoint, [bits] * shape.layers, quant, run.dtype, run.device, packed=True, ahead=range(shape.layers)
    )
    loader.compile_products(range(shape.layers), True, print)
    run.add(f"compile products at {bits} bits", seconds=time.monotonic() - began)
    began = time.monotonic()
    layers = [loader.decoder_layer(index) for index in range(shape.layers)]
    module = Layers([loader.embedding(), *layers, loader.head()])
    positional = loader.decoder.positions(run.device)
    if run.on_gpu:
        torch.cuda.synchronize()
    run.add(f"load at {bits} bits, kernel {loader.kernel.name}", seconds=time.monotonic() - began)
    costs = make_costs(run, shape, loader.kernel)
    fusion = Fusion(module, positional, run.dtype, run.device, print)
    if run.on_gpu and has_compiler(run.device):
        fusion.compile()
    run.add(f"compile blocks at {bits} bits", blocks=len(fusion.blocks), seconds=fusion.compile_seconds)
    _time_decode(run, module, positional, costs, bits, fusion)
    if bits == 16:
        _time_prefix(run, module, positional, shape)
    if bits in (4, 16):
        _time_prefill(run, module, positional, costs, bits)
    if further is not None:
        further(run, module, positional, shape, loader.decoder)


def resolve_quant(run: Run, shape: ModelShape, dtype: str = "bfloat16") -> QuantConfig:
    quant = select_kernel(QuantConfig(optimize=False), [run.device.type], dtype, shape.linears, None, shape.spec, True)
    return dataclasses.replace(quant, optimize=False)


def _time_decode(run: Run, module: Layers, positional: object, costs: RooflineCosts, bits: int, fusion: Fusion) -> None:
    points = [(1, 32), (2, 32), (4, 32)]
    if not run.tiny:  # first those that a bar is for
        points = [(64, 256), (1, 256), (16, 256), (128, 512), *((rows, 256) for rows in (256, 8, 32, 128, 2, 4))]
    for count, context in run.points(f"decode at {bits} bits", points):
        _time_step(run, module, positional, costs, bits, count, context, fusion)
        free(run.device)


def _time_step(
    run: Run, module: Layers, positional: object, costs: RooflineCosts, bits: int, rows: int, context: int,
    fusion: Fusion,
) -> None:  # fmt: skip
    """One decode step with greedy tokens: captured with compiled blocks, as the engine runs it; captured with plain
    ones; eager."""
    shape = costs.shape
    store = make_store(run, shape, rows, context + 1)
    if store is None:
        return
    at = torch.full((rows,), context - 1, device=run.device)
    tokens = torch.randint(0, shape.vocab, (rows, 1), device=run.device)

    def step() -> Step:
        cache = store.decode(0, rows, at, context)
        return Step(at[:, None], cache, context, False, token_ids=tokens, prepare=positional)

    began, before = time.monotonic(), _free_bytes(run)
    with fusion.use():
        runner = CapturedDecode(module, store, positional, capture_on(run.device), run.dtype)
        runner.run(step())
    captured, graph_bytes = time.monotonic() - began, before - _free_bytes(run)
    graph = timed(run, lambda: runner.run(step())[1].argmax(-1))
    plain = {}
    if fusion.blocks and fusion.compile_seconds and rows in FUSION_ROWS:
        unfused = CapturedDecode(module, store, positional, capture_on(run.device), run.dtype)
        plain["uncompiled_ms"] = 1e3 * timed(run, lambda: unfused.run(step())[1].argmax(-1))
    eager = timed(run, lambda: module(step()).logits.argmax(-1), 0.1)
    predicted = shape.layers * costs.decode_seconds(bits, rows, context - 1)
    predicted += costs.embed_seconds(rows, 1) + costs.head_seconds(rows)
    read = _bytes_read(costs, bits, rows, context)
    flops = shape.layers * (linear_flops(shape, rows) + attention_flops(shape, rows, 1, context - 1))
    flops += head_flops(shape, rows)
    run.add(
        f"decode at {bits} bits", PREDICTED, rows=rows, context=context, captured_ms=1e3 * graph, **plain,
        eager_ms=1e3 * eager,
        tokens_s=rows / graph, gb_s=read / graph / 1e9, share_of_copy=read / graph / run.rates["bytes"],
        share_of_product=flops / graph / run.rates["bfloat16"], predicted_ms=1e3 * predicted,
        measured_over_predicted=graph / predicted, capture_seconds=captured, graph_mib=graph_bytes / (1 << 20),
    )  # fmt: skip


def _time_prefix(run: Run, module: Layers, positional: object, shape: ModelShape) -> None:
    """A captured decode step of rows with a prefix in common: held once, and a copy in each slot."""
    rows, prefix, own = (2, 32, 16) if run.tiny else (64, 2048, 256)
    for once in run.points("decode with a prefix", [True, False]):
        store = make_store(run, shape, rows, prefix + own)
        if store is None:
            continue
        if once:
            store.shape_for(1, prefix)
            store.hold_prefix(prefix)
            store.shape_for(rows, own)
        seen = own if once else prefix + own
        at = torch.full((rows,), prefix + own - 1, device=run.device)
        shared = torch.full_like(at, prefix) if once else None
        cache, ids = store.decode(0, rows, at, seen, shared), torch.zeros(rows, 1, dtype=torch.long, device=run.device)
        step = Step(at[:, None], cache, seen, False, token_ids=ids, shared=shared, prepare=positional)
        runner = CapturedDecode(module, store, positional, capture_on(run.device), run.dtype)
        seconds = timed(run, partial(runner.run, step))
        held = "once" if once else "by each row"
        run.add(f"decode, prefix held {held}", rows=rows, prefix=prefix, own=own, ms=1e3 * seconds)
        free(run.device)


def _free_bytes(run: Run) -> int:
    free(run.device)
    return torch.cuda.mem_get_info()[0] if run.on_gpu else 0


def _bytes_read(costs: RooflineCosts, bits: int, rows: int, context: int) -> float:
    """Weights of the layers and of lm_head, and the cache."""
    shape, how = costs.shape, (costs.kernel, costs.groups, costs.dtype_bytes)
    weights = shape.layers * products.layer_read_bytes(shape, bits, *how) + products.lm_head_read_bytes(shape, 16, *how)
    return weights + shape.layers * kv_bytes(shape, rows, context, costs.dtype_bytes)


def make_store(run: Run, shape: ModelShape, rows: int, capacity: int) -> KVStore | None:
    needed = shape.layers * kv_bytes(shape, rows, capacity, run.dtype.itemsize)
    if run.on_gpu and needed > 0.8 * torch.cuda.mem_get_info()[0]:
        run.add("left out: no memory", "none", rows=rows, cache_gib=needed / (1 << 30))
        return None
    store = KVStore(0, shape.layers, rows * capacity, shape.kv_heads, shape.head_dim, run.dtype, run.device)
    store.shape_for(rows, capacity)
    return store


def _time_prefill(run: Run, module: Layers, positional: object, costs: RooflineCosts, bits: int) -> None:
    shape = costs.shape
    points = [(2, 32)] if run.tiny else [(8, 512), (1, 512), (1, 4096), (32, 512)]
    for rows, tokens in run.points(f"prefill at {bits} bits", points):
        store = make_store(run, shape, rows, tokens)
        if store is None:
            continue
        seconds = timed(run, _prefill(run, module, positional, store, rows, tokens))
        predicted = shape.layers * costs.prefill_seconds(bits, rows, tokens)
        predicted += costs.embed_seconds(rows, tokens) + costs.head_seconds(rows)
        flops = shape.layers * (linear_flops(shape, rows * tokens) + attention_flops(shape, rows, tokens, 0))
        run.add(
            f"prefill at {bits} bits", PREDICTED, rows=rows, tokens=tokens, ms=1e3 * seconds,
            tokens_s=rows * tokens / seconds, tflop_s=flops / seconds / 1e12,
            share_of_product=flops / seconds / run.rates["bfloat16"], predicted_ms=1e3 * predicted,
            measured_over_predicted=seconds / predicted,
        )  # fmt: skip


def _prefill(
    run: Run, module: Layers, positional: object, store: KVStore, rows: int, tokens: int
) -> Callable[[], Step]:
    ids = torch.randint(0, 100, (rows, tokens), device=run.device)
    positions = torch.arange(tokens, device=run.device).expand(rows, tokens)
    last = torch.full((rows,), tokens - 1, device=run.device)
    return lambda: module(
        Step(positions, store.prefill(range(rows)), tokens, True, token_ids=ids, last=last, prepare=positional)
    )


@torch.inference_mode()
def time_transformers(run: Run, folder: Path, compiled: bool) -> None:
    """transformers' own `generate` with a static cache, with its compilation or without."""
    config = LlamaConfig.from_pretrained(folder)
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(config, dtype=run.dtype).eval()
    prompt, few, many = (8, 2, 8) if run.tiny else (192, 8, 64)
    rows = (1, 2) if run.tiny else (64, 1) if compiled else (64, 1, 8, 256)
    for count in run.points("transformers", list(rows)):
        ids = torch.randint(3, config.vocab_size, (count, prompt), device=run.device)

        seconds = partial(_generate_seconds, model, ids, compiled)
        seconds(many), seconds(few)  # what comes first is slower
        step = (seconds(many) - seconds(few)) / (many - few)
        run.add(
            f"generate, static cache, {'compiled' if compiled else 'not compiled'}", rows=count, context=prompt + many,
            ms=1e3 * step, tokens_s=count / step,
        )  # fmt: skip


def _generate_seconds(model: torch.nn.Module, ids: torch.Tensor, compiled: bool, tokens: int) -> float:
    settings = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None,
        cache_implementation="static", disable_compile=not compiled,
    )  # fmt: skip
    began = time.monotonic()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings).tolist()
    return time.monotonic() - began
