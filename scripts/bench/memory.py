"""Predicted against measured memory of one stage that holds a whole model, part by part, on this machine's CPU.

    python scripts/bench/memory.py MODEL [--bits 16 8 4 3] [--sequences 16] [--prompt 128] [--generated 64]

Each width runs in a process of its own, for a peak is measured once a process: what is resident after all imports,
after loading, with the cache, and the peak over one prefill and one decode pass of all sequences.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4, 3])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options, options.one)))
        return
    from ds_llmpq.report.plan_table import table

    rows = []
    for bits in options.bits:
        line = [sys.executable, __file__, *sys.argv[1:], "--one", str(bits)]
        output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        for part, (predicted, measured) in json.loads(output.splitlines()[-1]).items():
            error = f"{predicted / measured - 1:+.1%}" if predicted else "-"
            rows.append([str(bits), part, f"{predicted / MIB:.1f}", f"{measured / MIB:.1f}", error])
    print(table(["bits", "part", "predicted MiB", "measured MiB", "error"], rows))


def measure(options, bits: int) -> dict[str, tuple[float, float]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    import ds_llmpq.engine.session  # noqa: F401 -- everything a stage imports
    from ds_llmpq.cost.memory import MemoryModel
    from ds_llmpq.engine import memory
    from ds_llmpq.engine.kv_cache import KVStore
    from ds_llmpq.engine.stage_loader import StageLoader
    from ds_llmpq.models.architecture import architecture_of
    from ds_llmpq.models.checkpoint import Checkpoint
    from ds_llmpq.models.shape import read_shape
    from ds_llmpq.quant.hqq import stored_bytes
    from ds_llmpq.quant.packing import Groups
    from ds_llmpq.schema import QuantConfig

    torch.set_num_threads(1)
    cpu, dtype = torch.device("cpu"), getattr(torch, options.dtype)
    shape, checkpoint = read_shape(options.model), Checkpoint(options.model)
    architecture = architecture_of(checkpoint.config)
    warm_up(StageLoader(checkpoint, [bits] * shape.layers, QuantConfig(optimize=False), dtype, cpu), shape)
    memory.release_freed()
    context = memory.used_bytes(cpu)
    loader = StageLoader(checkpoint, [bits] * shape.layers, QuantConfig(optimize=False), dtype, cpu)
    layers = [loader.embedding(), *(loader.decoder_layer(index) for index in range(shape.layers)), loader.head()]
    capacity = options.prompt + options.generated
    slots = options.sequences * capacity
    store = KVStore(0, shape.layers, slots, shape.kv_heads, shape.head_dim, dtype, cpu)
    store.shape_for(options.sequences, capacity)
    memory.release_freed()
    held, loading = memory.used_bytes(cpu), memory.peak_bytes(cpu)
    restart_peak()
    run_passes(options, layers, store, architecture.positional(checkpoint.config))
    model = MemoryModel(shape, Groups(), dtype.itemsize)
    # one process: nothing is sent
    parts = model.stage_bytes([bits] * shape.layers, options.sequences, capacity, first=True, last=True)
    weights = parts["weights"] + parts["embed"] + parts["head"]
    shapes = ((options.prompt, 0), (1, capacity - 1))
    needs = [model.workspace_parts(options.sequences, new, past, bits < 16) for new, past in shapes]
    work = max(max(need["activations"] + need["dequantized"], need["logits"]) for need in needs)
    return {
        "context": (0, context),
        "weights as allocated": (weights, stored_bytes(torch.nn.ModuleList(layers))),
        "cache as allocated": (parts["kv"], store.allocated_bytes),
        "weights and cache, resident": (weights + parts["kv"], held - context),
        "peak growth while loading": (0, loading - context),
        "peak growth in passes": (weights + parts["kv"] + work, peak() - context),
    }


def warm_up(loader, shape) -> None:
    """One layer, embedding and head over a few tokens: code that kernels generate and keep is the process's, too."""
    from ds_llmpq.engine.kv_cache import KVStore

    layers = [loader.embedding(), loader.decoder_layer(0), loader.head()]
    store = KVStore(0, 1, 64, shape.kv_heads, shape.head_dim, loader.dtype, loader.device)
    store.shape_for(2, 32)
    few = argparse.Namespace(sequences=2, prompt=16)
    run_passes(few, layers, store, loader.architecture.positional(loader.config))


def restart_peak() -> None:
    """Linux forgets the process's largest resident size so far, which loading may have set."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run_passes(options, layers, store, positional) -> None:
    import torch

    from ds_llmpq.models.step import Step

    rows, prompt = options.sequences, options.prompt
    tokens = torch.zeros(rows, prompt, dtype=torch.long)
    at = torch.full((rows,), prompt)
    prefill = Step(
        torch.arange(prompt).expand(rows, prompt), store.prefill(0, rows), prompt, True, tokens, last=at - 1
    )  # fmt: skip
    decode = Step(at[:, None], store.decode(0, rows, at, prompt + 1), prompt + 1, True, tokens[:, :1])
    with torch.inference_mode():
        for step in (prefill, decode):
            step.prepare = positional
            for layer in layers:
                layer(step)


if __name__ == "__main__":
    main()
