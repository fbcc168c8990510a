"""One rank of a trial pipeline of three stages on this host: what a pass costs beside its layers, and the links. A
calibration has its ranks time layers too, all at the same moment, one rank a device.

    python -m ds_llmpq.profiling SPEC    (SPEC is JSON; WORLD_SIZE and MASTER_* as a launcher sets them)

RANK says which rank this is; without it, this process forks all of them.

Each stage holds decoder layer 0, the first one also the embedding and the last one the head, and runs the engine's own
schedules over its own channels. Rank 0 prints one JSON line that starts with `MARK`.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from ds_llmpq.engine.channels import ActivationChannel, DataChannel, TokenChannel
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.pipeline_engine import InferencePipelineEngine
from ds_llmpq.engine.pipeline_module import LazyLayer, PlannedPipelineModule, PlannedTopology
from ds_llmpq.engine.rank_context import _init_process_group
from ds_llmpq.engine.trace import Trace
from ds_llmpq.launch.environment import read_place
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.profiling.joint_timing import time_points
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.slot_table import Finish

MARK = "ds-llmpq trial "
STAGES = ("first", "middle", "last")
DECODE_PASSES = 24  # of each group
LINK_BYTES = (8, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
LINK_REPEATS = 30


class LengthRule:
    """Ends rows by their number of tokens alone, as cheaply as a rule can."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def begin(self, slot: int, row: Sequence) -> None:
        self._most[slot] = row.max_tokens

    def __call__(self, slot: int, token: int, generated: int) -> Finish:
        return Finish.LENGTH if generated >= self._most[slot] else Finish.RUNNING


class PartClock:
    """Processor time inside pipeline layers: what is left of a pass is its overhead. Rotary embeddings and the like
    are computed in the first layer but once a pass, so they are taken out of it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def attach(self, module: torch.nn.Module) -> None:
        for layer in module.children():
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def positional(self, prepare: Any) -> Any:
        def timed(step: Any) -> None:
            start = time.thread_time()
            prepare(step)
            self.seconds -= time.thread_time() - start

        return timed

    def _begin(self, *_: object) -> None:
        self._start = time.thread_time()

    def _end(self, *_: object) -> None:
        self.seconds += time.thread_time() - self._start


def main(spec: dict[str, Any]) -> None:
    rank, _ = read_place()
    torch.set_num_threads(spec["threads"])
    timeout = datetime.timedelta(seconds=120)
    _init_process_group(spec["kind"], timeout)
    side = dist.new_group(backend="gloo", timeout=timeout)
    device = _device(spec, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = dist.get_world_size()
    found = {"links": [], "passes": [], "samples": []}
    if spec["links"] and ranks > 1:
        found["links"] = _links(rank, device, side)
    if points := spec.get("points"):  # ahead of passes, which would have met the points' sizes
        found["samples"] = time_points(points, spec, rank, device, side)
    if ranks == len(STAGES):
        found["passes"] = _passes(spec, rank, device, side)
    reports = DataChannel(side, rank, ranks).gather(found)
    if rank == 0:
        found = {name: [entry for report in reports for entry in report[name]] for name in found}
        print(MARK + json.dumps(found), flush=True)
    dist.destroy_process_group()


def _device(spec: dict[str, Any], rank: int) -> torch.device:
    if spec["kind"] == "cpu":
        return torch.device("cpu")
    slots = [device["slot"] for device in spec["points"]["devices"]] if "points" in spec else range(len(STAGES))
    return torch.device("cuda", slots[rank])


def _passes(spec: dict[str, Any], rank: int, device: torch.device, side: dist.ProcessGroup) -> list[dict[str, Any]]:
    engine, clock = _engine(spec, rank, device, side)
    found = []
    for size in spec["sizes"]:
        prompt = max(1, min(spec["prompt_tokens"], 4096 // size))
        for round_ in range(spec["rounds"]):
            if round_ == 0 and spec["rounds"] > 1:
                _overhead(engine, clock, size, prompt, 2)  # warm-up
                continue
            first = _overhead(engine, clock, size, prompt, 1)
            whole = _overhead(engine, clock, size, prompt, 1 + DECODE_PASSES)
            prefill, decode = first / 2, max(whole - first, 0.0) / (2 * DECODE_PASSES)
            common = {"part": STAGES[rank], "batch": size, "round": round_}
            found.append(common | {"phase": "prefill", "length_tokens": prompt, "seconds": prefill})
            found.append(common | {"phase": "decode", "length_tokens": 1, "seconds": decode})
    return found


def _overhead(engine: InferencePipelineEngine, clock: PartClock, size: int, prompt: int, generated: int) -> float:
    """Processor seconds of a request group of two micro-batches on this rank, but for those inside pipeline layers."""
    vocabulary = 7
    rows = tuple(Sequence(i, tuple((i + k) % vocabulary for k in range(prompt)), generated) for i in range(2 * size))
    limits = MicroBatchLimits(size, size * prompt, size)
    clock.seconds = 0.0
    start = time.thread_time()
    engine.run_stream(RequestGroup(rows), limits, lambda: None, lambda *finished: None)
    return time.thread_time() - start - clock.seconds


def _engine(
    spec: dict[str, Any], rank: int, device: torch.device, side: dist.ProcessGroup
) -> tuple[InferencePipelineEngine, PartClock]:
    path, dtype = spec["path"], getattr(torch, spec["dtype"])
    shape, checkpoint = read_shape(path), Checkpoint(path)
    loader = LayerLoader(checkpoint, [16] * shape.layers, QuantConfig(), dtype, device, packed=True)
    ranks = list(range(len(STAGES)))
    layers = [
        LazyLayer("embedding", loader.embedding),
        *(LazyLayer("layer 0", lambda: loader.decoder_layer(0)) for _ in ranks),
        LazyLayer("head", loader.head),
    ]
    module = PlannedPipelineModule(layers, [0, 2, 3, 5], PlannedTopology(ranks))
    clock = PartClock()
    clock.attach(module)
    slots = 2 * max(size * (min(spec["prompt_tokens"], 4096 // size) + DECODE_PASSES + 2) for size in spec["sizes"])
    engine = InferencePipelineEngine(
        module,
        KVStore(0, 1, slots, shape.kv_heads, shape.head_dim, dtype, device),
        clock.positional(loader.decoder.positions()),
        ActivationChannel(rank - 1 if rank else None, rank + 1 if rank < ranks[-1] else None, dtype, device),
        TokenChannel(side, ranks[-1], ranks[:-1]),
        LengthRule(),
        Trace(rank, device),
        dtype,
        shape.hidden,
    )
    return engine, clock


def _links(rank: int, device: torch.device, side: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Half a round trip over the engine's own channels between ranks 0 and 1, with rank 0's clock; the third waits.

    Hidden states by message size; tokens once, for their message is always small. Sizes take turns, so that a
    disturbance does not fall on one of them alone.
    """
    times: dict[tuple[str, int], list[float]] = {}
    if rank < 2:
        channel = ActivationChannel(1 - rank, 1 - rank, torch.uint8, device)
        tokens = TokenChannel(side, 0, [1]), TokenChannel(side, 1, [0])
        for repeat in range(LINK_REPEATS):
            for size in LINK_BYTES:
                seconds = _ping(rank, channel, size, device, 2 * repeat)
                times.setdefault(("activation", size), []).append(seconds)
            times.setdefault(("token", 8), []).append(_token_ping(rank, *tokens))
    dist.barrier(group=side)
    if rank:
        return []
    return [{"channel": channel, "bytes": size, "seconds": sorted(found)} for (channel, size), found in times.items()]


def _message(number: int) -> MicroBatch:
    """A micro-batch of one row."""
    return MicroBatch(number, "decode", (0,), (0,))


def _ping(rank: int, channel: ActivationChannel, size: int, device: torch.device, number: int) -> float:
    there, back = _message(number), _message(number + 1)
    message = torch.zeros(1, 1, size, dtype=torch.uint8, device=device)
    mine = back if rank == 0 else there
    channel.post_receive(mine, (1, 1, size))
    start = time.perf_counter()
    if rank == 0:
        channel.send(message)
    channel.wait(mine)
    if rank == 1:
        channel.send(message)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # NCCL's wait holds up the stream, not this thread
    seconds = (time.perf_counter() - start) / 2
    channel.flush()
    return seconds


def _token_ping(rank: int, out: TokenChannel, back: TokenChannel) -> float:
    batch, token = _message(0), torch.zeros(1, dtype=torch.int64)
    (back if rank == 0 else out).post_receive(batch)
    start = time.perf_counter()
    if rank == 0:
        out.send(token, token)
        back.receive(wait=True)
    else:
        out.receive(wait=True)
        back.send(token, token)
    seconds = (time.perf_counter() - start) / 2
    out.flush()
    back.flush()
    return seconds


def fork_ranks(spec: dict[str, Any]) -> int:
    """Runs all ranks as forks of this process, which has imported everything; 1 where one of them failed."""
    children = [_fork_rank(spec, rank) for rank in range(int(os.environ["WORLD_SIZE"]))]
    code = 0
    while children and code == 0:
        child, status = os.wait()
        children.remove(child)
        code = min(1, abs(os.waitstatus_to_exitcode(status)))
    for child in children:
        os.kill(child, signal.SIGKILL)
    return code


def _fork_rank(spec: dict[str, Any], rank: int) -> int:
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        main(spec)
        code = 0
    except BaseException:  # whatever it is, this fork must not go on as its parent would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
