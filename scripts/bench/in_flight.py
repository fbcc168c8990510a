"""What keeping the tokens in flight costs: one rank with the shipped model serves the same rows with and without.

    python scripts/bench/in_flight.py [ROUNDS]

Both take turns in one process, so that other programs disturb both alike. Prints a JSON line: medians of seconds and of
processor seconds of this thread, and their ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from ds_llmpq import config
from ds_llmpq.launch.launcher import find_free_port
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import (
    Deployment,
    MicroBatches,
    Plan,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
)
from ds_llmpq.serving.in_flight import InFlight

WORKLOAD = Workload(sequences=32, prompt_tokens=50, generated_tokens=62)
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
ENVIRONMENT |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def plan_of(path: Path) -> Plan:
    layers = read_shape(path).layers
    stage = Stage(
        0,
        "localhost",
        "localhost:0",
        "cpu",
        (0, layers),
        (16,) * layers,
        None,
        StageMemory(0.0, 0.0, 0.0, 0.0, 0.0),
        0.0,
        0.0,
        0.0,
        kind="cpu",
        slot=0,
        threads=1,
    )
    return Plan(
        model=PlannedModel(str(path), fingerprint=fingerprint(path)),
        workload=WORKLOAD,
        stages=(stage,),
        micro_batch=MicroBatches(4, 16),
        predicted=PredictedTotals(0.0, 0.0, 0.0, 0.0, 0.0),
        solver=SolverReport("hand", 0.0, None, None, 0.0, "checked"),
        quant=Quantization(bits=(16,)),
        deployment=Deployment("bfloat16"),
    )


def main(rounds: int) -> None:
    os.environ |= ENVIRONMENT | {"MASTER_PORT": str(find_free_port())}
    from ds_llmpq.engine.rank_context import init_rank, shutdown
    from ds_llmpq.engine.session import Session
    from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
    from ds_llmpq.scheduler.slot_table import Finish

    class Length:
        def begin(self, slot: int, row: Sequence) -> None: ...

        def __call__(self, slot: int, token: int, generated: int) -> Finish:
            return Finish.LENGTH if generated >= WORKLOAD.generated_tokens else Finish.RUNNING

    plan = plan_of(Path(config.asset("tiny-llama")))
    session = Session(plan, init_rank(plan, 600.0), plan.model_path, Length())
    prompt = tuple(range(3, 3 + WORKLOAD.prompt_tokens))
    rows = tuple(Sequence(key, prompt, WORKLOAD.generated_tokens) for key in range(WORKLOAD.sequences))

    def served(kept: InFlight | None) -> tuple[float, float]:
        def finished(row: Sequence, *rest: object) -> None:
            if kept is not None:
                kept.end(row.key)

        groups, seconds, busy = iter((RequestGroup(rows),)), time.perf_counter(), time.thread_time()
        session.run_all(lambda: next(groups, None), finished, on_tokens=None if kept is None else kept.add)
        return time.perf_counter() - seconds, time.thread_time() - busy

    served(None)  # what comes first is slower
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for keeps in (True, False) if number % 2 else (False, True):
                kept = InFlight(Path(folder), "0" * 64, {}) if keeps else None
                found[keeps].append(served(kept))
                if kept is not None:
                    kept.close()
    shutdown()
    medians = {
        keeps: [statistics.median(column) for column in zip(*pairs, strict=True)] for keeps, pairs in found.items()
    }
    kept_seconds, kept_busy = medians[True]
    seconds, busy = medians[False]
    print(
        json.dumps(
            {
                "rounds": rounds,
                "seconds_with": kept_seconds,
                "seconds_without": seconds,
                "ratio": kept_seconds / seconds,
                "busy_ratio": kept_busy / busy,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
