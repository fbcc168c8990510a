"""One rank of a trial pipeline of two or three stages on this host: what a pass costs beside its layers, and the links.
A calibration has its ranks time layers too, all at the same moment, one rank a device.

    python -m ds_llmpq.profiling SPEC    (SPEC is JSON; WORLD_SIZE and MASTER_* as a launcher sets them)

RANK says which rank this is; without it, this process forks all of them.

The ranks join and load their stages as those of `serve` do: the plan has a few decoder layers a stage, and the engine
runs its own schedules over its own channels. Rank 0 prints one JSON line that starts with `MARK`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from ds_llmpq.cost.profile import DRAW
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.engine.pipeline_engine import InferencePipelineEngine
from ds_llmpq.engine.rank_context import RankContext, init_rank, shutdown
from ds_llmpq.engine.session import Session
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import Plan
from ds_llmpq.profiling.contention import MICRO_BATCHES
from ds_llmpq.profiling.joint_timing import time_points
from ds_llmpq.profiling.trial_process import DECODE_PASSES, MARK, STAGES, cut_prompt, name_place
from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

LINK_BYTES = (8, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
LINK_REPEATS = 20
DRAWN = SamplingParams(temperature=1.0, seed=0)
_TIMEOUT_SECONDS = 120
_DRAWN_PASSES = 8
_IMPORTED_LATE = "deepspeed.module_inject.auto_ep_layer"  # by a stage that loads


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

    def time_positional(self, prepare: Any) -> Any:
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
    plan = Plan.from_json(spec["plan"])
    context = init_rank(plan, _TIMEOUT_SECONDS)
    found = {"links": [], "passes": [], "periods": [], "samples": [], "took": []}
    if spec["links"] and len(plan.stages) > 1:
        found["links"] = _time_links(context)
    fewest = 2 if spec["kind"] == "cpu" else len(STAGES)
    if fewest <= len(plan.stages) <= read_shape(plan.model_path).layers:
        found["passes"], found["periods"] = _time_passes(spec, plan, context)
    if points := spec.get("points"):
        found["samples"], found["took"] = time_points(points, plan, context)
    reports = context.data.gather(found)
    if context.is_driver:
        found = {name: [entry for report in reports for entry in report[name]] for name in found}
        print(MARK + json.dumps(found), flush=True)
    shutdown()


def _time_passes(
    spec: dict[str, Any], plan: Plan, context: RankContext
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What passes cost this rank beside their layers, in processor time; and on rank 0 the seconds from a decode pass
    to the next, by the clock on the wall."""
    session = Session(plan, context, plan.model_path, LengthRule(), options=EngineConfig(decode_graphs=False))
    clock = PartClock()
    clock.attach(session.engine.module)
    session.engine.steps.positional = clock.time_positional(session.engine.steps.positional)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is beside the layers is small; several ranks' threads would only wait for a core
    found, periods = [], []
    for size in spec["sizes"]:
        prompt = cut_prompt(spec["prompt_tokens"], size)
        for round_ in range(spec["rounds"]):
            if round_ == 0 and spec["rounds"] > 1:
                _time_overhead(session.engine, clock, size, prompt, 2)  # warm-up
                continue
            first, prefilled = _time_overhead(session.engine, clock, size, prompt, 1)
            whole, passed = _time_overhead(session.engine, clock, size, prompt, 1 + DECODE_PASSES)
            prefill, decode = first / MICRO_BATCHES, max(whole - first, 0.0) / (MICRO_BATCHES * DECODE_PASSES)
            common = {"part": name_place(context.stage_index, len(plan.stages)), "batch": size, "round": round_}
            found.append(common | {"phase": "prefill", "length_tokens": prompt, "seconds": prefill})
            found.append(common | {"phase": "decode", "length_tokens": 1, "seconds": decode})
            if context.is_driver:
                period = max(passed - prefilled, 0.0) / (MICRO_BATCHES * DECODE_PASSES)
                past = prompt + DECODE_PASSES // 2
                periods.append({"batch": size, "past": past, "round": round_, "seconds": period})
            drawn, _ = _time_overhead(session.engine, clock, size, prompt, 1 + _DRAWN_PASSES, drawn=1)
            if context.stage_index == len(plan.stages) - 1:
                seconds = max(drawn - first - MICRO_BATCHES * _DRAWN_PASSES * decode, 0.0)
                seconds /= MICRO_BATCHES * (1 + _DRAWN_PASSES)
                found.append(common | {"part": DRAW, "phase": "decode", "length_tokens": 1, "seconds": seconds})
    torch.set_num_threads(threads)
    return found, periods


def _time_overhead(
    engine: InferencePipelineEngine, clock: PartClock, size: int, prompt: int, generated: int, drawn: int = 0
) -> tuple[float, float]:
    """A request group of two micro-batches on this rank: processor seconds, but for those inside pipeline layers, and
    seconds on the wall. `drawn`: rows of each micro-batch whose tokens are drawn."""
    vocabulary = 7
    rows = tuple(
        Sequence(
            i, tuple((i + k) % vocabulary for k in range(prompt)), generated, DRAWN if i % size < drawn else GREEDY
        )
        for i in range(MICRO_BATCHES * size)
    )
    limits = MicroBatchLimits(size, size * prompt, size)
    clock.seconds = 0.0
    begin, start = time.perf_counter(), time.thread_time()
    engine.run_stream(RequestGroup(rows), limits, lambda: None, lambda *finished: None)
    return time.thread_time() - start - clock.seconds, time.perf_counter() - begin


def _time_links(context: RankContext) -> list[dict[str, Any]]:
    """Half a round trip over the engine's own channels between ranks 0 and 1, with rank 0's clock; the third waits.

    Hidden states by message size; tokens once, for their message is always small. Sizes take turns, so that a
    disturbance does not fall on one of them alone.
    """
    times: dict[tuple[str, int], list[float]] = {}
    rank, side, device = context.rank, context.side_group, context.device
    if rank < 2:
        channel = ActivationChannel(1 - rank, 1 - rank, torch.uint8, device)
        tokens = TokenChannel(side, 0, [1]), TokenChannel(side, 1, [0])
        for repeat in range(LINK_REPEATS):
            for size in LINK_BYTES:
                seconds = _ping(rank, channel, size, device, 2 * repeat)
                times.setdefault(("activation", size), []).append(seconds)
            times.setdefault(("token", 8), []).append(_ping_token(rank, *tokens))
    dist.barrier(group=side)
    if rank:
        return []
    return [{"channel": channel, "bytes": size, "seconds": sorted(found)} for (channel, size), found in times.items()]


def _build_message(number: int) -> MicroBatch:
    """A micro-batch of one row."""
    return MicroBatch(number, "decode", (0,), (0,))


def _ping(rank: int, channel: ActivationChannel, size: int, device: torch.device, number: int) -> float:
    there, back = _build_message(number), _build_message(number + 1)
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


def _ping_token(rank: int, out: TokenChannel, back: TokenChannel) -> float:
    batch, token = _build_message(0), torch.zeros(1, dtype=torch.int64)
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
    with contextlib.suppress(ImportError):  # other versions have other parts; this only saves time
        importlib.import_module(_IMPORTED_LATE)
    open_checkpoint(spec["path"])  # imports what its family needs of transformers
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
