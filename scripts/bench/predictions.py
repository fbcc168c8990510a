"""Do predictions hold on the first run? Predicted and measured seconds of whole runs, from an empty cache.

    python scripts/make_checkpoint.py --preset 135m M135
    python scripts/bench/predictions.py M135 OUT [--only demo,two,random,chat] [--repeats 5] [--plans 12] [--series 2]
                                        [--seed 0]

`demo`: the demonstration, calibrated anew each time. `two`: a model on two heterogeneous CPU stages (the planner
would leave the slower one out), with prompts and answers of many lengths, free slots refilled. `random`: plans by
hand of the same model, of one or two stages, and how well their predictions rank them (Kendall's tau). All plans run
once a series; tau between the measured times of two series is what a perfect prediction would reach on such a
machine. `chat`: chats with the shipped model on this machine's one stage and on two, calibrated anew each time: most
begin with one system prompt, and answers end when the model ends them. OUT keeps every run: one that has ended is not
run again. Both cores of the machine are measured, so let nothing else run.
"""

import argparse
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from scipy.stats import kendalltau

from ds_llmpq.models.shape import read_shape
from ds_llmpq.report.plan_table import format_table

SERIES = ("demo", "two", "random", "chat")
CLUSTER, DEVICES = "local_heterogeneous2", ("localhost:0", "localhost:1")
ROWS, PROMPT, ANSWER = 32, (24, 128), (16, 64)  # tokens, from and to
CHATS, CHAT_TOKENS, SHARED_OF_TEN = 400, 64, 9  # rows, the most tokens of an answer, rows in ten with the system prompt
SYSTEM = "You answer with one short Python function. " * 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--only", default=",".join(SERIES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--series", type=int, default=2, help="of the random plans")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, model = Path(options.out).absolute(), Path(options.model).absolute()
    out.mkdir(parents=True, exist_ok=True)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SERIES):
        parser.error(f"--only knows {', '.join(SERIES)}, not {', '.join(unknown)}")
    found = {}
    if "demo" in chosen:
        names = [f"demo{index}" for index in range(options.repeats)]
        found["demo"] = [run(out / name, ["+experiment=demo"], out / f"{name}.cache") for name in names]
    requests = write_requests(out / "requests.jsonl", random.Random(options.seed))
    planned = [f"model.path={model}", f"cluster={CLUSTER}", "workload=demo", "quant.optimize=false"]
    if "two" in chosen:
        layers = read_shape(model).layers
        cut = layers - layers // 3
        pinned = f"planner.pins.layers={{{DEVICES[0]}: [0, {cut}], {DEVICES[1]}: [{cut}, {layers}]}}"
        line = [*planned, f"input={requests}", pinned]
        found["two"] = [run(out / f"two{index}", line, out / "cache") for index in range(options.repeats)]
    if "random" in chosen:
        plans = random_plans(read_shape(model).layers, options.plans, options.seed)
        for turn in range(options.series):
            found["random" if turn == 0 else f"random, series {turn + 1}"] = [
                run_plan(out / f"plan{index:02}", turn, plan, planned, requests, out / "cache")
                for index, plan in enumerate(plans)
            ]
    if "chat" in chosen:
        chats = write_chats(out / "chats.jsonl", random.Random(options.seed))
        for name, cluster in (("chat", "auto"), ("chat, two stages", CLUSTER)):
            folders = [out / f"{name.replace(', ', '_').replace(' ', '_')}{index}" for index in range(options.repeats)]
            line = ["model=tiny", f"cluster={cluster}", f"input={chats}"]
            found[name] = [run(folder, line, folder.with_suffix(".cache")) for folder in folders]
    (out / "predictions.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n\n".join(describe(name, rows, found.get("random", [])) for name, rows in found.items())
    (out / "predictions.txt").write_text(text + "\n")
    print(text)


def run_plan(folder: Path, turn: int, plan: dict, planned: list[str], requests: Path, cache: Path) -> dict:
    decided, made = folder.with_suffix(".json"), folder.with_name(f"{folder.name}.plan")
    decided.write_text(json.dumps(plan))
    if not (made / "plan.json").is_file():
        call("plan", [*planned, f"check={decided}", f"out={made}"], cache, made.with_suffix(".plan.log"))
    folder = folder.with_name(f"{folder.name}-{turn + 1}") if turn else folder
    return run(folder, [f"plan={made / 'plan.json'}", f"input={requests}"], cache)


def run(folder: Path, overrides: list[str], cache: Path) -> dict:
    """What the run in `folder` predicted and measured; it is made where it has not ended yet."""
    log, journal = folder.with_suffix(".log"), folder / "run.json"
    if not journal.is_file() or json.loads(journal.read_text())["attempts"][-1]["reason"] != "finished":
        shutil.rmtree(folder, ignore_errors=True)
        call("run", [*overrides, f"out={folder}"], cache, log)
    metrics = json.loads((folder / "metrics.json").read_text())
    pairs, text = metrics["predicted_against_measured"], log.read_text()
    timed = re.search(r"timed in ([\d.]+) s", text)
    row = {
        "run": folder.name,
        "calibration_seconds": float(timed[1]) if timed else None,
        **{f"{phase}_ratio": pairs[f"{phase}_seconds"]["ratio"] for phase in ("prefill", "decode")},
        "predicted_seconds": pairs["latency_seconds"]["predicted"],
        "measured_seconds": pairs["latency_seconds"]["measured"],
        "restarts": metrics["restarts"]["restarts"],
    }
    print("{run}: predicted {predicted_seconds:.2f} s, measured {measured_seconds:.2f} s".format(**row), flush=True)
    return row


def call(command: str, overrides: list[str], cache: Path, log: Path) -> None:
    line = [sys.executable, "-m", "ds_llmpq", command, *overrides]
    with log.open("w") as file:
        done = subprocess.run(line, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"{command} failed, see {log}")


def write_requests(file: Path, generator: random.Random) -> Path:
    rows = []
    for index in range(ROWS):
        prompt = [generator.randint(3, 99) for _ in range(generator.randint(*PROMPT))]
        body = {"model": "m", "prompt": prompt, "max_tokens": generator.randint(*ANSWER), "ignore_eos": True}
        rows.append({"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_chats(file: Path, generator: random.Random) -> Path:
    """Requests for functions that the standard library documents, which the shipped model was trained on."""
    modules = (argparse, json, random, re, shutil, subprocess)
    members = [(name, getattr(module, name)) for module in modules for name in sorted(vars(module))]
    asked = [f"{name}: {inspect.getdoc(member).splitlines()[0]}" for name, member in members if inspect.getdoc(member)]
    rows = []
    for index in range(CHATS):
        messages = [{"role": "user", "content": generator.choice(asked)}]
        if index % 10 < SHARED_OF_TEN:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        body = {"model": "m", "messages": messages, "max_tokens": CHAT_TOKENS}
        rows.append({"custom_id": f"c{index}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def random_plans(layers: int, count: int, seed: int) -> list[dict]:
    """One or both devices in any order, a cut anywhere, one or two bit widths a stage, micro-batches of 1 to 16."""
    generator, found = random.Random(seed), []
    for _ in range(count):
        devices = generator.sample(DEVICES, generator.choice([1, 2, 2]))
        cuts = [0, *sorted(generator.sample(range(1, layers), len(devices) - 1)), layers]
        stages = []
        for device, first, last in zip(devices, cuts, cuts[1:], strict=False):
            low, high = sorted(generator.choices([3, 4, 8, 16], k=2))
            turn = generator.randint(0, last - first)
            bits = [low] * turn + [high] * (last - first - turn)
            stages.append({"device": device, "layers": [first, last], "bits": bits})
        sizes = {"prefill": generator.choice([1, 2, 4, 8]), "decode": generator.choice([2, 4, 8, 16])}
        found.append({"stages": stages, "micro_batch": sizes})
    return found


def describe(name: str, rows: list[dict], first_series: list[dict]) -> str:
    """The table of a series; behind those of random plans how well they were ranked, and how well they could be."""
    head = ["run", "calibration s", "predicted s", "measured s", "times predicted", "prefill", "decode", "restarts"]
    ratios = [row["measured_seconds"] / row["predicted_seconds"] for row in rows]
    lines = [
        [
            row["run"],
            "" if row["calibration_seconds"] is None else f"{row['calibration_seconds']:.1f}",
            f"{row['predicted_seconds']:.3f}",
            f"{row['measured_seconds']:.3f}",
            *(f"{ratio:.2f}" for ratio in (by_run, row["prefill_ratio"], row["decode_ratio"])),
            str(row["restarts"]),
        ]
        for row, by_run in zip(rows, ratios, strict=True)
    ]
    said = f"{name}: measured over predicted, median {median(ratios):.3f}, {min(ratios):.2f} to {max(ratios):.2f}"
    if name.startswith("random"):
        said += f"; Kendall's tau of the ranking {rank(rows, 'predicted', rows):.3f}"
        if rows is not first_series:
            said += f", of the first series' measured times {rank(first_series, 'measured', rows):.3f}"
    return f"{format_table(head, lines)}\n{said}"


def rank(guesses: list[dict], side: str, rows: list[dict]) -> float:
    """Kendall's tau between the guesses' seconds and those that were measured of `rows`."""
    return kendalltau([row[f"{side}_seconds"] for row in guesses], [row["measured_seconds"] for row in rows]).statistic


if __name__ == "__main__":
    main()
