"""Peak resident memory of two ranks that load a checkpoint cut in two, held against each rank's share of the weights.

    python scripts/bench/load_memory.py CHECKPOINT --cut 6 --bits 4

CHECKPOINT is a folder as `scripts/make_checkpoint.py` writes it (`--preset 1gb` for the figures in docs/decisions.md).
Each rank is a fresh process that joins a gloo group, loads its layers, and generates a few tokens with the other. One
JSON line per rank: share (weights and KV cache by the memory model), resident memory before loading (imports), peak,
seconds of loading, and output tokens/s. `--kind cuda` runs the ranks on two GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from ds_llmpq.cost.memory import MemoryModel
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
from ds_llmpq.quant.kernels.registry import find_kernel
from ds_llmpq.quant.packing import Groups

GROUP_SIZE = 64
WORKLOAD = Workload(sequences=4, prompt_tokens=64, generated_tokens=8)


def plan_of(options: argparse.Namespace) -> Plan:
    """Two stages on this machine, decoder layers [0, cut) and [cut, all), every layer at `bits`."""
    shape = read_shape(options.checkpoint)
    kernel = find_kernel(options.kernel)
    memory = MemoryModel(shape, Groups(GROUP_SIZE), {"float32": 4, "bfloat16": 2}[options.dtype], kernel)
    capacity = WORKLOAD.prompt_tokens + WORKLOAD.generated_tokens
    stages = []
    for rank, (first, last) in enumerate([(0, options.cut), (options.cut, shape.layers)]):
        bits = (options.bits,) * (last - first)
        sizes = StageMemory(
            weights=len(bits) * memory.layer_bytes(options.bits),
            kv=len(bits) * WORKLOAD.sequences * memory.kv_bytes_per_sequence_layer(capacity),
            embed=memory.embed_bytes() if rank == 0 else 0,
            head=memory.head_bytes() if rank == 1 else 0,
            workspace=0.0,
        )
        stages.append(
            Stage(
                rank,
                "localhost",
                f"{options.kind}:{rank}",
                options.kind,
                (first, last),
                bits,
                options.kernel,
                sizes,
                0.0,
                0.0,
                0.0,
                kind=options.kind,
                slot=rank,
                threads=1 if options.kind == "cpu" else None,
            )
        )
    return Plan(
        model=PlannedModel(str(options.checkpoint), fingerprint=fingerprint(options.checkpoint)),
        workload=WORKLOAD,
        stages=tuple(stages),
        micro_batch=MicroBatches(2, 2),
        predicted=PredictedTotals(0.0, 0.0, 0.0, 0.0, 0.0),
        solver=SolverReport("hand", 0.0, None, None, 0.0, "checked"),
        quant=Quantization(bits=(options.bits,), group_size=GROUP_SIZE, optimize=False, kernel=options.kernel),
        deployment=Deployment(options.dtype),
    )


def run_rank(plan: Plan) -> dict:
    """This process's part; the launcher's variables are in the environment."""
    from ds_llmpq.engine.rank_context import init_rank, shutdown
    from ds_llmpq.engine.session import Session
    from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
    from ds_llmpq.scheduler.slot_table import Finish

    class Length:
        def begin(self, slot: int, row: Sequence) -> None: ...

        def __call__(self, slot: int, token: int, generated: int) -> Finish:
            return Finish.LENGTH if generated >= WORKLOAD.generated_tokens else Finish.RUNNING

    context = init_rank(plan, timeout_seconds=600)
    session = Session(plan, context, plan.model_path, Length())
    loaded = session.report()["memory_bytes"]["peak"]
    prompt = tuple(range(3, 3 + WORKLOAD.prompt_tokens))
    rows = tuple(Sequence(key, prompt, WORKLOAD.generated_tokens) for key in range(WORKLOAD.sequences))
    groups = iter((RequestGroup(rows),))
    began = time.perf_counter()
    session.run_all(lambda: next(groups, None), lambda *finished: None)
    seconds = time.perf_counter() - began
    measured = session.report()["memory_bytes"]
    shutdown()
    share = sum(context.stage.memory_bytes.by_part().values())
    return {
        "rank": context.rank,
        "layers": list(context.stage.layers),
        "share_bytes": int(share),
        "held_bytes": measured["weights"] + measured["kv"],
        "before_loading_bytes": measured["before_loading"],
        "peak_loading_bytes": loaded,
        "peak_bytes": measured["peak"],
        "load_seconds": session.load_seconds,
        "output_tokens_per_second": WORKLOAD.sequences * WORKLOAD.generated_tokens / seconds,
        "peak_over_share_bytes": measured["peak"] - int(share),
    }


def run_both(arguments: list[str], kind: str) -> int:
    """Starts this script once for each rank; fresh processes, so that nothing is inherited."""
    common = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    common |= {"DS_ACCELERATOR": kind, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    return max(abs(rank.wait()) for rank in ranks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cut", type=int, required=True, help="decoder layers of the first rank")
    parser.add_argument("--bits", type=int, default=16, help="width of every layer")
    parser.add_argument("--kernel", default="dequantize", help="dequantize, openvino, openvino_graph")
    parser.add_argument("--kind", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        return run_both(sys.argv[1:], options.kind)
    print(json.dumps(run_rank(plan_of(options))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
