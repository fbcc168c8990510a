"""This project beside other engines: same machine, same threads, same checkpoint and prompts, in one run.

    python scripts/make_checkpoint.py --preset 850m MODEL
    python scripts/bench/serve.py MODEL OUT [--batch 8 32] [--repeats 3] [--only NAME ...] [--peers llamacpp-q4 ...]

Contenders take turns, so that a disturbance does not fall on one alone; OUT keeps every run, and an interrupted series
goes on. Each is warmed up first: ours by a wave of its own, a peer by a short call. Prompts of `--prompt` random
tokens, `--generate` tokens each, greedy, end-of-sequence off, so that every engine does the same work; the medians of
`--repeats` runs are compared. A peer that is not installed is left out, and said to be. ours-BITSxSTAGES has its
threads shared out among its stages; `8rows` is 8 bits with one group a row (quant.per_channel_bits=[8]), as
CTranslate2 has it; `mix` is half of the layers at 4, half at 8. `--prefill-rows`: most prompts of ours in a prefill
pass (0: 4 on one stage, 1 on more, as the planner takes them, so that the second begins early); `--lm-head-bits`: width
of lm_head of ours at 8 bits and below; `--longest-first`. OUT does not tell these apart, so give each its own folder.

`--requests 48`: instead, so many requests whose answers have a long tail of lengths (`--generate` on average, cut off
at three times that), `--batch` of them under way at a time; ours refills its slots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from bisect import bisect_left, bisect_right
from pathlib import Path
from statistics import median

from length_runs import drawn_lengths
from peers import random_prompts

from ds_llmpq.cluster.rates import measure_cpu
from ds_llmpq.models.shape import read_shape
from ds_llmpq.report.plan_table import format_table

OURS = (
    "ours-16x1", "ours-8rowsx1", "ours-8x1", "ours-4x1", "ours-mixx1", "ours-16x2", "ours-8rowsx2", "ours-8x2",
    "ours-4x2",
)  # fmt: skip
PEERS = (
    "transformers-bf16", "transformers-hqq4", "ctranslate2-bf16", "ctranslate2-int8",
    "llamacpp-bf16", "llamacpp-q8", "llamacpp-q4", "vllm-bf16",
    "openvino-genai-bf16", "openvino-genai-int8", "openvino-genai-int4",
)  # fmt: skip
RIVALS = {"16": "bf16", "8rows": "int8 q8", "8": "int8 q8", "4": "hqq4 q4 int4"}  # peers of each precision class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    sizes = (("prompt", 128), ("generate", 64), ("threads", 2), ("repeats", 3), ("requests", 0))
    sizes += (("prefill-rows", 0), ("lm-head-bits", 16))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--python", nargs="*", default=[], help="of a peer with an environment of its own: vllm=PATH llamacpp=PATH ..."
    )
    parser.add_argument("--longest-first", action="store_true", help="answers of ours in that order, as by default")
    parser.add_argument("--only", nargs="+", default=OURS)
    parser.add_argument("--peers", nargs="*", default=PEERS)
    options = parser.parse_args()
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    options.lengths = drawn_lengths(options.requests, options.generate, 3 * options.generate)
    (out / "lengths.json").write_text(json.dumps(options.lengths))
    missing: set[str] = set()
    for repeat in range(options.repeats):
        for batch in options.batch:
            for name in (*options.only, *options.peers):
                folder = out / f"{name}_b{batch}_r{repeat}"
                if name in missing or (folder / "times.json").is_file():
                    continue
                folder.mkdir(exist_ok=True)
                times = ours(name, options, batch, folder) if name in OURS else peer(name, options, batch, folder)
                if times is None:
                    missing.add(name)
                    print(f"{name}: left out, see {folder / 'log'}")
                    continue
                (folder / "times.json").write_text(json.dumps(times) + "\n")
                print(f"{name} B={batch}: {times}", flush=True)
    text = "\n\n".join(report(out, options, batch) for batch in options.batch)
    print(text)
    (out / "summary.txt").write_text(text + "\n")


def ours(name: str, options: argparse.Namespace, batch: int, folder: Path) -> dict | None:
    """Through `ds-llmpq run` and the real launcher, from a plan by hand."""
    kind, _, stages = name.removeprefix("ours-").rpartition("x")
    layers, stages = read_shape(options.model).layers, int(stages)
    prefill_rows = min(options.prefill_rows or (4 if stages == 1 else 1), batch)
    cuts = [round(index * layers / stages) for index in range(stages + 1)]
    width = int(kind.removesuffix("rows")) if kind != "mix" else 0
    widths = [width or 4 + 4 * (layer % 2) for layer in range(layers)]
    lm_head_bits = 16 if width == 16 else options.lm_head_bits
    per_channel_bits = f"quant.per_channel_bits=[{width if kind.endswith('rows') else ''}]"
    hand = {
        "stages": [
            {"device": f"localhost:{index}", "layers": [first, last], "bits": widths[first:last]}
            for index, (first, last) in enumerate(itertools.pairwise(cuts))
        ],
        "micro_batch": {"prefill": prefill_rows, "decode": batch // stages},
    }
    (folder / "hand.json").write_text(json.dumps(hand))
    # a first wave to warm up, as the peers have one; it must stay first, so orders are the file's
    answers = sorted(options.lengths, reverse=True) if options.longest_first else options.lengths
    waves = [2] * batch, answers or [options.generate] * batch
    rows = [
        {
            "custom_id": f"r{index}-of-{len(lengths)}-{tokens}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True},
        }
        for lengths in waves
        for index, (prompt, tokens) in enumerate(
            zip(random_prompts(len(lengths), options.prompt), lengths, strict=True)
        )
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    devices = [
        f"{{type: cpu_core, slot: {index}, threads: {options.threads // stages}, memory_bytes: 12000000000}}"
        for index in range(stages)
    ]
    plan = [
        "plan", f"model.path={Path(options.model).absolute()}", "cluster=local_cpu2", "planner.calibrate=never",
        per_channel_bits, f"quant.lm_head_bits={lm_head_bits}", f"cluster.hosts.0.devices=[{', '.join(devices)}]",
        f"check={folder / 'hand.json'}",
        f"workload.sequences={batch}", f"workload.prompt_tokens={options.prompt}",
        f"workload.generated_tokens={max(options.lengths or [options.generate])}", f"out={folder / 'plan'}",
    ]  # fmt: skip
    run = [
        "run", f"plan={folder / 'plan' / 'plan.json'}", f"model.path={Path(options.model).absolute()}",
        f"input={folder / 'prompts.jsonl'}", f"out={folder / 'run'}", f"engine.refill={bool(options.lengths)}",
        "batch.order=arrival",
    ]  # fmt: skip
    for command in (plan, run):
        if not called([sys.executable, "-m", "ds_llmpq", *command], folder, {}):
            return None
    return spans(folder / "run", batch * options.prompt)


def spans(folder: Path, prompt_tokens: int) -> dict:
    """Of the second wave, from the trace: until the last stage has sampled all first tokens, and until it has all. It
    begins with the call that brings the first tokens of its prompts. prompt_tokens: of a wave of the batch's size."""
    events = [event for event in json.loads((folder / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    measured = json.loads((folder / "metrics.json").read_text())["measured"]
    last = max(event["pid"] for event in events)
    prefills = sorted(
        (event for event in events if event["name"] == "prefill" and event["pid"] == 0), key=lambda event: event["ts"]
    )
    computed = list(itertools.accumulate(event["args"]["tokens"] for event in prefills))
    start = prefills[bisect_right(computed, prompt_tokens)]["ts"]
    all_prompts = prefills[bisect_left(computed, 2 * prompt_tokens)]["ts"]
    own = [event for event in events if event["ts"] >= start]
    samples = sorted(event["ts"] + event["dur"] for event in own if event["name"] == "sample")
    inside = sum(event["dur"] for event in own if event["name"] in ("prefill", "decode")) / 1e6
    everything = (samples[-1] - start) / 1e6
    return {
        "first_seconds": (samples[bisect_right(samples, all_prompts)] - start) / 1e6,
        "all_seconds": everything,
        "overhead_share": 1 - inside / everything if last == 0 else None,
        "startup_seconds": measured["startup_seconds"],
        "time_to_first_token_seconds": measured["time_to_first_token_seconds"],
    }


def peer(name: str, options: argparse.Namespace, batch: int, folder: Path) -> dict | None:
    engine = name.rpartition("-")[0]
    python = dict(entry.split("=", 1) for entry in options.python).get(engine, sys.executable)
    line = [python, str(Path(__file__).with_name("peers.py")), name, options.model, "--batch", str(batch)]
    for key in ("prompt", "generate", "threads"):
        line += [f"--{key}", str(getattr(options, key))]
    line += ["--cache", str(Path(options.out).absolute() / "peer_models")]
    if options.lengths:
        line += ["--lengths", str(Path(options.out).absolute() / "lengths.json")]
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    if python != sys.executable:
        environment["PYTHONPATH"] = ""  # peers put there for this interpreter do not fit the other one
    said = called(line, folder, environment)
    return json.loads(said.splitlines()[-1]) if said else None


def called(line: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a process printed, "" if it failed; its errors go to the folder's log."""
    with (folder / "log").open("a") as log:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment)
        log.write(done.stdout)
    return done.stdout if done.returncode == 0 else ""


def report(out: Path, options: argparse.Namespace, batch: int) -> str:
    """Tokens per second of prefill, of decode and of all; of all alone where lengths differ."""
    speeds = {}
    for name in (*options.only, *options.peers):
        runs = [json.loads(file.read_text()) for file in sorted(out.glob(f"{name}_b{batch}_r*/times.json"))]
        if not runs:
            continue
        tokens = sum(options.lengths) or batch * options.generate
        speeds[name] = [tokens / median(run["all_seconds"] for run in runs)]
        if not options.lengths:
            first = median(run["first_seconds"] for run in runs)
            decode = median(run["all_seconds"] - run["first_seconds"] for run in runs)
            speeds[name] = [batch * options.prompt / first, batch * (options.generate - 1) / decode, *speeds[name]]
    reference = speeds.get("ours-16x1")
    rows = []
    for name, speed in speeds.items():
        ratios = ["-"] * len(speed)
        if reference:
            ratios = [f"{own / other:.2f}" for own, other in zip(speed, reference, strict=True)]
        rows.append([name, *(part for pair in zip(map("{:.1f}".format, speed), ratios, strict=True) for part in pair)])
    columns = ["tokens/s"] if options.lengths else ["prefill tokens/s", "decode tokens/s", "tokens/s"]
    head = ["engine", *(part for column in columns for part in (column, "to ours-16x1"))]
    repeats = len(list(out.glob(f"ours-16x1_b{batch}_r*/times.json")))
    work = f"generate {options.generate}"
    if options.lengths:
        work += f" on average, {max(options.lengths)} at most, {options.requests} requests"
    title = (
        f"{Path(options.model).name}, B = {batch}, prompt {options.prompt}, {work}, {options.threads} threads, "
        f"medians of {repeats}"
    )
    limits = [] if options.lengths else [roofline(options, speeds, batch)]
    return "\n".join([title, format_table(head, rows), *against(speeds), *limits])


def against(speeds: dict[str, list[float]]) -> list[str]:
    """Ours over the best peer of equal precision, in tokens/s of the whole batch."""
    lines = []
    for bits, kinds in RIVALS.items():
        rivals = {name: speed[-1] for name, speed in speeds.items() if name.rpartition("-")[2] in kinds.split()}
        if (own := speeds.get(f"ours-{bits}x1")) and rivals:
            best = max(rivals, key=rivals.get)
            lines.append(f"{bits} bits: ours is {own[-1] / rivals[best]:.2f}x the best peer, {best}")
    return lines


def roofline(options: argparse.Namespace, speeds: dict[str, list[float]], batch: int) -> str:
    """What decode at 16 bits reads and prefill computes, against what this machine was measured to reach."""
    if "ours-16x1" not in speeds:
        return ""
    shape = read_shape(options.model)
    weights = shape.layers * shape.linear_weights + shape.vocab * shape.hidden
    rates = measure_cpu(options.threads)
    bandwidth = options.threads * rates["memory_bandwidth_bytes_per_second"]
    flops = options.threads * rates["flops_per_second"].get("bfloat16", 0.0)
    prefill, decode, _ = speeds["ours-16x1"]
    return (
        f"ours-16x1: decode reads {2 * weights * decode / batch / 1e9:.1f} GB/s of weights (a read of memory was "
        f"measured at {bandwidth / 1e9:.1f}), prefill computes {2 * weights * prefill / 1e9:.0f} GFLOP/s (a matrix "
        f"product at {flops / 1e9:.0f})"
    )


if __name__ == "__main__":
    main()
