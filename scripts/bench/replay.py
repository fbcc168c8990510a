"""Policies on the real pipeline: traces replayed at shares of its capacity, lengths predicted from prompts.

    python scripts/bench/replay.py OUT [--loads 0.7 0.9] [--seeds 3] [--requests 120] [--policies fcfs ssjf sjf]

The shipped model in two processes under the real launcher, few slots. Prompts are synthetic, their lengths depend on
what they say, long tail included (`make_length_data.py`); max_tokens is the true length, end-of-sequence is ignored.
So `sjf`, which takes limits for lengths, is the oracle; `ssjf` has a predictor trained on another draw and sees no
limit. For each seed: the requests all at once give the capacity (requests/s), then Poisson arrivals at each load,
under one policy after the other. OUT keeps every run, and an interrupted series goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from length_runs import (
    MODEL,
    hand_plan,
    load_of_machine,
    load_tokenizer,
    request,
    run_metrics,
    scaled_answers,
    trained_predictor,
    write_lines,
)

from ds_llmpq.report.plan_table import format_table
from ds_llmpq.research.arrivals import draw_arrival_times

TRAINING_SEED = 10_000
HEAD = ["load", "policy", "runs", "mean JCT", "p50", "p99", "mean waiting", "longest waiting", "JCT against fcfs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--policies", nargs="+", default=["fcfs", "ssjf", "sjf"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--mean-tokens", type=float, default=30.0)
    parser.add_argument("--longest", type=int, default=300)
    parser.add_argument("--training", type=int, default=4000, help="answers the predictor is trained on")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"before: {load_of_machine()}", flush=True)
    predictor = trained_predictor(
        out / "predictor", options.training, TRAINING_SEED, options.mean_tokens, options.longest
    )
    runs = [run for seed in range(options.seeds) for run in of_seed(options, out, seed, predictor)]
    write_lines(out / "runs.jsonl", runs)
    text = summary(options, runs)
    print(f"after: {load_of_machine()}")
    print(text)
    (out / "summary.txt").write_text(text + "\n")


def of_seed(options: argparse.Namespace, out: Path, seed: int, predictor: Path) -> list[dict[str, Any]]:
    """Capacity, then each load under each policy: the same requests, at the same times for all policies."""
    folder = out / f"seed{seed}"
    drawn = scaled_answers(options.requests, seed, options.mean_tokens, options.longest)
    tokenizer = load_tokenizer(MODEL, False)
    prompt_tokens = max(len(tokenizer(each.text)["input_ids"]) for each in drawn)
    plan = hand_plan(folder, options.slots, prompt_tokens, max(each.output_tokens for each in drawn))

    def written(name: str, arrivals: Any) -> Path:
        rows = [
            request(f"r{index}", each.text, each.output_tokens, model=each.model, ignore_eos=True, arrival_seconds=when)
            for index, (each, when) in enumerate(zip(drawn, arrivals.tolist(), strict=True))
        ]
        return write_lines(folder / name, rows)

    together = written("together.jsonl", np.zeros(len(drawn)))
    offline = run_metrics(plan, together, folder / "capacity")["measured"]
    capacity = len(drawn) / offline["serving_seconds"]
    print(f"seed {seed}: capacity {capacity:.2f} requests/s, {offline['generated_tokens']} tokens", flush=True)
    runs = []
    for load in options.loads:
        times = draw_arrival_times("poisson", len(drawn), load * capacity, 1.0, np.random.default_rng([seed, 1]))
        trace = written(f"load{load:g}.jsonl", times)
        turned = seed % len(options.policies)  # who comes first changes from seed to seed
        for policy in [*options.policies[turned:], *options.policies[:turned]]:
            ours = [f"batch.predictor={predictor}"] if policy in ("ssjf", "longest_first") else []
            measured = run_metrics(
                plan, trace, folder / f"load{load:g}_{policy}", "batch.replay=trace", f"batch.policy={policy}", *ours
            )
            replay = measured["replay"]
            runs.append({"seed": seed, "load": load, "capacity": capacity, "machine": load_of_machine()} | replay)
            print(f"  load {load:g} {policy}: mean JCT {replay['jct_seconds']['mean']:.2f} s", flush=True)
    return runs


def summary(options: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
    """Means over the seeds; the last column compares runs of one seed and takes the mean of the ratios."""
    lines = []
    for load in options.loads:
        fcfs = {run["seed"]: run for run in runs if run["load"] == load and run["policy"] == "fcfs"}
        for policy in options.policies:
            own = [run for run in runs if run["load"] == load and run["policy"] == policy]
            jct = [mean(run["jct_seconds"][name] for run in own) for name in ("mean", "p50", "p99")]
            waiting = [mean(run["waiting_seconds"]["mean"] for run in own)]
            waiting.append(max(run["waiting_seconds"]["max"] for run in own))
            gain = "-"
            if fcfs:
                ratios = [run["jct_seconds"]["mean"] / fcfs[run["seed"]]["jct_seconds"]["mean"] - 1 for run in own]
                gain = f"{100 * mean(ratios):+.0f} % ({100 * min(ratios):+.0f} to {100 * max(ratios):+.0f})"
            cells = [f"{value:.2f} s" for value in (*jct, *waiting)]
            lines.append([f"{load:g}", policy, str(len(own)), *cells, gain])
    counts = json.dumps({"requests": options.requests, "slots": options.slots, "mean_tokens": options.mean_tokens})
    return f"measured, through the launcher; {counts}\n{format_table(HEAD, lines)}"


if __name__ == "__main__":
    main()
