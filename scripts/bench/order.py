"""Offline makespan on the real pipeline: by order of requests, with and without refill, and by what admission reserves.

    python scripts/bench/order.py OUT [--part order admission] [--requests 160] [--repeats 3] [--slots 8]

The shipped model in two processes under the real launcher. OUT keeps every run; variants take turns.

order: synthetic prompts with a long tail of lengths (`scripts/make_length_data.py`); max_tokens is the true length and
end-of-sequence is ignored, so `predicted_length` and `bucketed` without a predictor know all lengths: the best that
prediction could buy. admission: questions about functions, answered by the model itself until it ends them, all with
one generous limit. Past answers (another draw, run first) train the predictor, which sizes one plan for all variants.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

from length_runs import (
    MODEL,
    called,
    hand_plan,
    load_of_machine,
    load_tokenizer,
    request,
    run_metrics,
    scaled_answers,
    write_lines,
)

from ds_llmpq.report.plan_table import format_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_corpus import chat_of, functions_with_docstrings, read_documents

ORDER = {
    "arrival": ["batch.order=arrival"],
    "prompt_length": ["batch.order=prompt_length"],
    "predicted_length, lengths known": ["batch.order=predicted_length"],
    "bucketed, lengths known": ["batch.order=bucketed"],
    "arrival, no refill": ["engine.refill=false", "batch.order=arrival"],
    "predicted_length, lengths known, no refill": ["engine.refill=false", "batch.order=predicted_length"],
}
ADMISSION = {
    "worst_case": ["batch.order=arrival"],
    "worst_case, longest first": ["batch.order=predicted_length"],
    "q95": ["batch.admission=q95", "batch.order=arrival"],
    "q90": ["batch.admission=q90", "batch.order=arrival"],
    "q95, longest first": ["batch.admission=q95", "batch.order=predicted_length"],
}
KIND = 3  # what does this function do: answers that end far below their limit
HEAD = ["variant", "runs", "makespan", "range", "against the first", "decode passes", "requeued"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", nargs="+", choices=("order", "admission"), default=["order", "admission"])
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--mean-tokens", type=float, default=40.0)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--limit", type=int, default=256, help="max_tokens of every request of the admission part")
    parser.add_argument("--training", type=int, default=400, help="requests whose answers train its predictor")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"before: {load_of_machine()}", flush=True)
    parts = {"order": by_order, "admission": by_admission}
    text = "\n\n".join(parts[part](options, out / part) for part in options.part)
    print(f"after: {load_of_machine()}")
    print(text)
    (out / "summary.txt").write_text(text + "\n")


def by_order(options: argparse.Namespace, out: Path) -> str:
    out.mkdir(exist_ok=True)
    drawn = scaled_answers(options.requests, 0, options.mean_tokens, options.longest)
    rows = [request(f"r{index}", each.text, each.output_tokens, ignore_eos=True) for index, each in enumerate(drawn)]
    tokenizer = load_tokenizer(MODEL, False)
    prompt_tokens = max(len(tokenizer(each.text)["input_ids"]) for each in drawn)
    plan = hand_plan(out, options.slots, prompt_tokens, max(each.output_tokens for each in drawn))
    return measured(options, out, plan, write_lines(out / "rows.jsonl", rows), ORDER)


def by_admission(options: argparse.Namespace, out: Path) -> str:
    out.mkdir(exist_ok=True)
    chats = chat_rows(options.training + options.requests, options.limit)
    past = write_lines(out / "past.jsonl", chats[: options.training])
    rows = write_lines(out / "rows.jsonl", chats[options.training :])
    first = hand_plan(out / "first", options.slots, 200, options.limit)
    counts = run_metrics(first, past, out / "first" / "run")["measured"]
    print(f"past answers: {counts['rows']} of {counts['generated_tokens'] / counts['rows']:.0f} tokens on average")
    predictor = out / "predictor"
    if not (predictor / "predictor.json").is_file():
        results = out / "first" / "run" / "results.jsonl"
        told = ["action=train", f"data={results}", f"lengths.input={past}", f"out={predictor}"]
        called("lengths", told, out)
    told = [f"batch.predictor={predictor}"]
    plan = out / "plan" / "plan.json"
    if not plan.is_file():  # sequences as asked for, s and n by the requests and the predictor
        sized = ["batch.admission=q95", *told, f"input={rows}", f"workload.sequences={options.slots}"]
        hand = out / "first" / "hand.json"
        called(
            "plan", [f"model.path={MODEL}", "cluster=local_cpu2", f"check={hand}", f"out={plan.parent}", *sized], out
        )
    variants = {name: [*overrides, *(told if overrides else [])] for name, overrides in ADMISSION.items()}
    return measured(options, out, plan, rows, variants)


def chat_rows(count: int, limit: int) -> list[dict[str, Any]]:
    """Questions about documented functions of the standard library, in a fixed order."""
    documents, held_out = read_documents()
    functions = [found for text in (documents | held_out).values() for found in functions_with_docstrings(text)]
    dice = random.Random(0)
    picked = dice.sample(functions, min(count, len(functions)))
    rows = []
    for index, (function, seed) in enumerate(zip(picked, range(count), strict=False)):
        [question] = [turn for turn in chat_of(*function, kind=KIND)[:1] if turn["role"] == "user"]
        rows.append(request(f"c{index}", [question], limit, temperature=0.7, seed=seed))
    return rows


def measured(options: argparse.Namespace, out: Path, plan: Path, rows: Path, variants: dict[str, list[str]]) -> str:
    """A table of the variants' makespans: from the first wave to the last token, start-up left out."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for repeat in range(options.repeats):
        for index, (name, overrides) in enumerate(variants.items()):
            metrics = run_metrics(plan, rows, out / f"v{index}_{repeat}", *overrides)
            found[name].append(metrics)
            print(f"  {out.name} {name}: {metrics['measured']['serving_seconds']:.1f} s", flush=True)
    seconds = {name: [run["measured"]["serving_seconds"] for run in runs] for name, runs in found.items()}
    base = median(next(iter(seconds.values())))
    lines = []
    for name, runs in found.items():
        own, order = seconds[name], runs[0]["order"]
        lines.append(
            [
                name,
                str(len(own)),
                f"{median(own):.1f} s",
                f"{min(own):.1f} to {max(own):.1f}",
                f"{100 * (median(own) / base - 1):+.0f} %",
                str(order["decode_passes"]),
                str(order["requeued"]),
            ]
        )
    return f"{out.name}: measured, medians; {rows.name} of {options.requests} requests\n{format_table(HEAD, lines)}"


if __name__ == "__main__":
    main()
