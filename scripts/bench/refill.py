"""Refilled slots beside waves of the same size, on a long tail of lengths: throughput, the same answers, level memory.

    python scripts/bench/refill.py OUT [--requests 300] [--repeats 3] [--slots 16] [--mean-tokens 177] [--longest 512]

The shipped model in two processes under the real launcher, 16 bits, `engine.batch_invariant`; answer lengths are drawn
from an exponential distribution cut off at the longest, and end-of-sequence is ignored. Variants take turns; the first
two serve in the file's order, as if no length were known.
Checked: the answers are the same byte for byte, and no rank's cache is more than its plan says. The resident memory of
each rank is sampled once a second; its growth is from a quarter of the serving time to the end. OUT keeps every run.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from length_runs import (
    MODEL,
    ROOT,
    drawn_lengths,
    hand_plan,
    load_of_machine,
    load_tokenizer,
    request,
    scaled_answers,
    write_lines,
)

from ds_llmpq.report.plan_table import format_table

_ARRIVAL = "batch.order=arrival"
VARIANTS = {"refill": [_ARRIVAL], "waves": ["engine.refill=false", _ARRIVAL], "longest_first": []}
HEAD = ["variant", "runs", "tokens/s", "range", "against waves", "decode passes", "memory of ranks, quarter to end"]
_MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    for name, default in (("requests", 300), ("repeats", 3), ("slots", 16), ("mean-tokens", 177), ("longest", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"before: {load_of_machine()}", flush=True)
    lengths = drawn_lengths(options.requests, options.mean_tokens, options.longest)
    prompts = [each.text for each in scaled_answers(options.requests, 0, 30.0, 300)]
    pairs = enumerate(zip(prompts, lengths, strict=True))
    rows = [request(f"r{index}", text, tokens, ignore_eos=True) for index, (text, tokens) in pairs]
    tokenizer = load_tokenizer(MODEL, False)
    prompt_tokens = max(len(tokenizer(text)["input_ids"]) for text in prompts)
    plan = hand_plan(out, options.slots, prompt_tokens, max(lengths))
    file = write_lines(out / "rows.jsonl", rows)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for repeat in range(options.repeats):
        for name in options.variants:
            runs[name].append(watched(plan, file, out / f"{name}{repeat}", VARIANTS[name]))
            print(f"  {name}: {runs[name][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
    answers = {json.dumps(run["answers"], sort_keys=True) for own in runs.values() for run in own}
    over = max(run["cache_over_plan"] for own in runs.values() for run in own)
    same = "the same in all runs" if len(answers) == 1 else "NOT the same in all runs"
    text = "\n".join(
        [
            f"measured, medians; {options.requests} requests, {options.slots} slots, answers of {np.mean(lengths):.0f} "
            f"tokens on average, 99th percentile {np.percentile(lengths, 99):.0f}, longest {max(lengths)}",
            summary(runs),
            f"answers: {same}; cache: {over:.4f} of the plan's",
        ]
    )
    print(f"after: {load_of_machine()}\n{text}")
    (out / "summary.txt").write_text(text + "\n")
    return 0 if len(answers) == 1 and over <= 1.0 else 1


def watched(plan: Path, file: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """One run and what was seen of it; kept in OUT."""
    kept = out.with_suffix(".json")
    if kept.is_file():
        return json.loads(kept.read_text())
    line = [sys.executable, "-m", "ds_llmpq", "run", f"plan={plan}", f"input={file}", f"out={out}"]
    line += ["engine.batch_invariant=true", *overrides]
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, cwd=ROOT)
        memory = sampled(process)
    if process.wait():
        sys.exit(f"run failed; see {out.with_suffix('.log')}")
    metrics = json.loads((out / "metrics.json").read_text())
    bytes_of = [stage["memory_bytes"] for stage in metrics["stages"]]
    lines = (out / "results.jsonl").read_text().splitlines()
    found = {
        "tokens_per_second": metrics["measured"]["throughput_tokens_per_second"],
        "decode_passes": metrics["order"]["decode_passes"],
        "cache_over_plan": max(each["measured"]["kv"] / each["predicted"]["kv"] for each in bytes_of),
        "memory": memory,
        "answers": {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in map(json.loads, lines)},
    }
    kept.write_text(json.dumps(found))
    return found


def sampled(process: subprocess.Popen) -> dict[str, list[int]]:
    """Resident bytes of each rank, once a second, until the process ends."""
    found: dict[str, list[int]] = {}
    while process.poll() is None:
        time.sleep(1.0)
        try:
            children = psutil.Process(process.pid).children(recursive=True)
        except psutil.Error:
            break
        for child in children:
            try:
                if "ds_llmpq.commands.serve" in child.cmdline() and (rank := child.environ().get("RANK")) is not None:
                    found.setdefault(f"rank {rank}", []).append(child.memory_info().rss)
            except psutil.Error:
                continue
    return found


def summary(runs: dict[str, list[dict[str, Any]]]) -> str:
    speeds = {name: [run["tokens_per_second"] for run in own] for name, own in runs.items()}
    base = median(speeds["waves"]) if "waves" in speeds else math.nan
    lines = []
    for name, own in runs.items():
        memory = [
            f"{values[len(values) // 4] / _MIB:.0f} to {values[-1] / _MIB:.0f} MiB"
            for _, values in sorted(own[-1]["memory"].items())
            if values
        ]
        low, high = min(speeds[name]), max(speeds[name])
        speed = [f"{median(speeds[name]):.0f}", f"{low:.0f} to {high:.0f}", f"{median(speeds[name]) / base:.2f}x"]
        lines.append([name, str(len(own)), *speed, str(own[0]["decode_passes"]), ", ".join(memory)])
    return format_table(HEAD, lines)


if __name__ == "__main__":
    sys.exit(main())
