"""Predicted against measured memory of a model's stages, from real runs on this machine's CPU.

    python scripts/bench/memory.py MODEL OUT [--bits 16 8 4 3] [--kernel auto] [--sequences 16] [--prompt 128]
                                   [--generated 64] [--stages 1]

Each width is one `ds-llmpq run` of two waves of as many rows as the plan counts on. "Growth while serving" is what the
process held at most while it served, beyond what it held before it loaded, without pages of mapped files (libraries).
OUT keeps the runs; one that is there is not run again.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from ds_llmpq.models.shape import read_shape
from ds_llmpq.report.plan_table import format_table

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "out"):
        parser.add_argument(name)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4, 3])
    parser.add_argument("--kernel", default="auto")
    for name, value in (("sequences", 16), ("prompt", 128), ("generated", 64), ("stages", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    rows = []
    for bits in options.bits:
        folder = Path(options.out).absolute() / f"{bits}bits{options.stages if options.stages > 1 else ''}"
        if not (folder / "run" / "metrics.json").is_file():
            run(options, bits, folder)
        stages = json.loads((folder / "run" / "metrics.json").read_text())["stages"]
        for index, stage in enumerate(stages):
            rows += [[str(bits), str(index), *cells] for cells in compare(stage["memory_bytes"])]
    print(format_table(["bits", "stage", "part", "predicted MiB", "measured MiB", "error"], rows))


def run(options: argparse.Namespace, bits: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    layers = read_shape(options.model).layers
    cuts = [layers * index // options.stages for index in range(options.stages + 1)]
    stages = [
        {"device": f"localhost:{index}", "layers": [first, last], "bits": [bits] * (last - first)}
        for index, (first, last) in enumerate(itertools.pairwise(cuts))
    ]
    devices = ",".join(
        f"{{type: cpu_core, slot: {index}, threads: 1, memory_bytes: 12000000000}}" for index in range(options.stages)
    )
    rows = options.sequences
    hand = {"stages": stages, "micro_batch": {"prefill": max(1, rows // 4), "decode": rows}}
    (folder / "hand.json").write_text(json.dumps(hand))
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(2 * rows):
            prompt = [draw.randrange(3, 256) for _ in range(options.prompt)]
            body = {"model": "m", "prompt": prompt, "max_tokens": options.generated, "ignore_eos": True}
            row = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    model = f"model.path={Path(options.model).absolute()}"
    plan = [
        "plan", model, "cluster=local_cpu2", f"check={folder / 'hand.json'}", f"out={folder / 'plan'}",
        f"cluster.hosts.0.devices=[{devices}]",
        "quant.optimize=false", f"quant.kernel={options.kernel}", f"workload.sequences={rows}",
        f"workload.prompt_tokens={options.prompt}", f"workload.generated_tokens={options.generated}",
    ]  # fmt: skip
    serve = ["run", model, f"plan={folder / 'plan' / 'plan.json'}", f"input={folder / 'rows.jsonl'}"]
    with (folder / "log").open("w") as log:
        for command in (plan, [*serve, f"out={folder / 'run'}"]):
            line = [sys.executable, "-m", "ds_llmpq", *command]
            subprocess.run(line, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def compare(memory: dict) -> list[list[str]]:
    predicted, measured = memory["predicted"], memory["measured"]
    pairs = {
        "weights as allocated": (sum(predicted[name] for name in ("weights", "embed", "head")), measured["weights"]),
        "cache as allocated": (predicted["kv"], measured["kv"]),
        "growth when loaded": (predicted["total"] - predicted["workspace"], measured["growth_of_loading"]),
        "growth while serving": (predicted["total"], measured["peak_growth"]),
    }
    return [
        [name, f"{told / MIB:.1f}", f"{seen / MIB:.1f}", f"{told / seen - 1:+.1%}"]
        for name, (told, seen) in pairs.items()
    ]


if __name__ == "__main__":
    main()
