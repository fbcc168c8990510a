"""A process that has imported everything once and forks the ranks of a pipeline on demand.

Importing torch, transformers and DeepSpeed takes seconds for each rank; a fork of a process that has done so, and has
not computed anything yet, takes milliseconds. Run as a script: one JSON request a line in, one JSON answer a line out.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed  # noqa: F401 -- imported before the fork, for all ranks
import fake_kernel
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.engine.rank_context import RankContext, init_rank, shutdown
from ds_llmpq.engine.session import Session
from ds_llmpq.engine.stage_run.faults import Fault
from ds_llmpq.launch.launcher import find_free_port
from ds_llmpq.plan import Plan
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.slot_table import Finish

TIMEOUT_SECONDS = 120.0
fake_kernel.register()


class TokenRule:
    """Ends rows at given tokens and at max_tokens; with `every`, also at every so many-th token of a row.

    It must be asked on the last stage only, once for each token of a running row, in order.
    """

    def __init__(self, eos: list[int], every: int | None, last: bool):
        self.eos = set(eos)
        self.every = every
        self.last = last

        self.rows: dict[int, Sequence] = {}
        self.seen: dict[int, int] = {}

    def begin(self, slot: int, row: Sequence) -> None:
        self._assert_last()
        self.rows[slot], self.seen[slot] = row, len(row.generated)

    def __call__(self, slot: int, token: int, generated: int) -> Finish:
        self._assert_last()
        self.seen[slot] += 1
        if self.seen[slot] != generated:
            raise AssertionError(f"slot {slot}: asked {self.seen[slot]} times for {generated} tokens")
        if (token in self.eos and not self.rows[slot].sampling.ignore_eos) or generated == self.every:
            return Finish.STOP
        return Finish.LENGTH if generated >= self.rows[slot].max_tokens else Finish.RUNNING

    def _assert_last(self) -> None:
        if not self.last:
            raise AssertionError("the stop rule was asked on a stage that is not the last")


def run_case(case: dict, joined: RankContext) -> dict:
    """One session on this rank: loads its stage, runs the case's groups, says what it knows of every row."""
    plan = Plan.from_json(case["plan"])
    index = next(i for i, stage in enumerate(plan.stages) if stage.rank == joined.rank)
    context = dataclasses.replace(
        joined, stage_index=index, stage=plan.stages[index], stage_ranks=[stage.rank for stage in plan.stages]
    )
    last = index + 1 == len(plan.stages)
    options = EngineConfig(**case["options"])
    session = Session(plan, context, case["path"], TokenRule(case["eos"], case["every"], last), options=options)
    _break_rank(case, joined.rank)
    for poison in case["poison"]:
        if poison["stage"] == index:
            _poison(session, **poison)
    if str(index) in case["room"]:
        _limit_memory(session, case["room"][str(index)])
    logits: list[list] = []
    if case["logits"]:
        _record_logits(session, logits)
    groups = [RequestGroup.from_bytes(bytes.fromhex(group)) for group in case["groups"]]
    waiting, again = deque(groups), []
    outcomes, faults = [], []

    def finished(row: Sequence, tokens: list[int], finish: Finish) -> None:
        if finish is Finish.PREEMPTED:
            again.append(dataclasses.replace(row, generated=tuple(tokens)))
        else:
            outcomes.append([row.key, list(tokens), int(finish)])

    def take() -> RequestGroup | None:
        if waiting:
            return waiting.popleft()
        rows, again[:] = tuple(again), []
        return RequestGroup(rows) if rows else None

    def broken(row: Sequence, fault: Fault | None) -> None:
        if fault is not None:
            faults.append([row.key, dataclasses.asdict(fault)])

    told: list[tuple[int, int]] = []
    on_tokens = (lambda *rows: told.extend(zip(*rows, strict=True))) if context.is_driver else None
    session.share_prefix(tuple(case["prefix"]) if context.is_driver else ())
    session.run_all(take, finished, broken, on_tokens)
    return {
        "stage": index,
        "outcomes": outcomes,
        "told": told if context.is_driver else None,
        "faults": faults if context.is_driver else None,
        "lengths": [list(times.lengths) for times in session.engine.stream_times if not times.of_prefix],
        "logits": logits,
        "report": session.report(),
        "passes": {key: session.trace.summary()["passes"].get(key, 0) for key in ("prefill", "decode", "sample")},
    }


def _record_logits(session: Session, into: list[list]) -> None:
    """Keeps (key, tokens generated before, logits) of every row that is sampled."""
    chooser, choose = session.engine.chooser, session.engine.chooser._choose

    def recording(table, slots, logits, counts):
        for slot, values, count in zip(slots, logits.tolist(), counts, strict=True):
            if (key := table.sequences[slot].key) >= 0:  # a prefix is nobody's row
                into.append([key, count, values])
        return choose(table, slots, logits, counts)

    chooser._choose = recording


def _poison(
    session: Session, stage: int, keys: list[int], generated: int, where: str = "last layer", message: str = "no"
) -> None:
    """The stage raises in each pass that brings one of the rows with so many tokens generated or more; with no keys, in
    every pass. Rows that only go along count as well. `where`: a layer, or "sampling", or "tokens": then `keys` are
    tokens, and the first stage raises for rows that bring one."""
    engine = session.engine

    def bad(slot: int) -> bool:
        row = engine.stream.slots.sequences[slot]
        return row.key in keys and len(engine.stream.slots.generated[slot]) >= generated

    def in_layer(layer, inputs):
        cache = inputs[0].cache
        if not keys or (cache.store is session.store and any(bad(slot) for slot, *_ in cache.row_places())):
            raise LookupError(message)

    def in_sampling(table, slots, logits, counts):
        if any(map(bad, slots)):
            raise LookupError(message)
        return choose(table, slots, logits, counts)

    def in_embedding(layer, inputs):
        if set(keys) & set(inputs[0].token_ids.flatten().tolist()):
            raise LookupError(message)

    if where == "tokens":
        engine.module.forward_funcs[0].register_forward_pre_hook(in_embedding)
    elif where == "sampling":
        choose, engine.chooser._choose = engine.chooser._choose, in_sampling
    else:
        place = 0 if where == "first layer" else -1
        engine.module.forward_funcs[place].register_forward_pre_hook(in_layer)


def _limit_memory(session: Session, most_tokens: int) -> None:
    """The stage runs out of memory, in the middle of its layers, in each pass of more tokens."""

    def last_layer(layer, inputs):
        if inputs[0].positions.numel() > most_tokens:
            raise torch.OutOfMemoryError(f"no room for {most_tokens + 1} tokens")

    session.engine.module.forward_funcs[-1].register_forward_pre_hook(last_layer)


def _break_rank(case: dict, rank: int) -> None:
    if case["dies"] == rank:
        os._exit(7)


def rank_main(rank: int, world: int, port: int, requests) -> None:
    """A rank: joins the others with its first request, then answers (results, None) or (None, what went wrong)."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(2, 1)  # whatever prints must not disturb the answers
    torch.set_num_threads(1)
    context, index = None, 0
    while cases := requests.recv():
        try:
            context = context or init_rank(Plan.from_json(cases[0]["plan"]), TIMEOUT_SECONDS)
            results = []
            for index, case in enumerate(cases):  # noqa: B007 -- the failing case is named below
                before = set(distributed_c10d._world.pg_map)
                results.append(run_case(case, context))
                _close_groups(before)
            requests.send((results, None))
        except BaseException as error:
            kind = f"case {index}, rank {rank}: {type(error).__name__}"
            requests.send((None, f"{kind}: {error}\n{traceback.format_exc()}"))
            sys.exit(1)
    shutdown()


def _close_groups(before: set) -> None:
    """Those that DeepSpeed made for the last session: a gloo group's thread wakes a hundred times a second."""
    dist.barrier()
    gc.collect()
    for group in set(distributed_c10d._world.pg_map) - before:
        dist.destroy_process_group(group)


class Pool:
    """The ranks of pipelines of one length, forked with the first request and kept until one of them fails."""

    def __init__(self, world: int):
        context, port = multiprocessing.get_context("fork"), find_free_port()
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=rank_main, args=(rank, world, port, pipes[rank][1]), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def answer(self, request: dict) -> dict:
        """{"problem": None or what went wrong, "codes": exit codes, "ranks": each rank's results}."""
        for pipe in self.pipes:
            pipe.send(request["cases"])
        limit = time.monotonic() + request["timeout"]
        results: list[list | None] = [None] * len(self.pipes)
        problem = None
        while problem is None and None in results:
            for rank, pipe in enumerate(self.pipes):
                if results[rank] is None and pipe.poll(0.005):
                    results[rank], problem = self._received(pipe)
            if problem is None and any(process.exitcode for process in self.processes):
                problem = "a rank ended without a word"
            if problem is None and time.monotonic() > limit:
                problem = f"no answer within {request['timeout']} s; ranks without one: {results.count(None)}"
        if problem is not None:
            self._end(wait_seconds=20 if request["expect_death"] else 0)
        return {"problem": problem, "codes": [process.exitcode for process in self.processes], "ranks": results}

    def _received(self, pipe) -> tuple[list | None, str | None]:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            return None, "a rank ended without a word"

    def _end(self, wait_seconds: float) -> None:
        for process in self.processes:
            process.join(wait_seconds)
        for process in self.processes:
            process.kill()
            process.join()


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: collecting in the ranks need not look at it
    pools: dict[int, Pool] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        world = len(request["cases"][0]["plan"]["stages"])
        pool = pools.get(world) or pools.setdefault(world, Pool(world))
        answer = pool.answer(request)
        if answer["problem"] is not None:
            del pools[world]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
