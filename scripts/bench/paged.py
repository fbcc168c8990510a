"""Requests of ShareGPT-like lengths in the same KV cache: slots for the longest, and more rows that share its blocks.

    python scripts/make_checkpoint.py --preset 850m MODEL
    python scripts/bench/paged.py MODEL OUT [--requests 120] [--slots 8] [--rows 24] [--equal] [--repeats 1]
                                  [ARGUMENTS of `ds-llmpq run` ...]

Prompts and answers are log-normal (medians of 120 and 180 tokens, at most 1,024 and 512; scaled down where the model
has fewer positions) in a random order, and every answer ends at its own max_tokens. With --equal all are of the median
length, and as many rows share the blocks as there are slots: nothing should change. Medians over the repeats, in turns.
Answers are greedy; those of both ways are compared, which are the same in float32 (`engine.dtype=float32`).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import read_plan
from ds_llmpq.report.plan_table import format_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--equal", action="store_true")
    for name, default in (("requests", 120), ("slots", 8), ("rows", 24), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options, arguments = parser.parse_known_args()
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    write_rows(options, out / "rows.jsonl")
    runs: dict[str, list[dict]] = {"slots": [], "paged": []}
    answers: dict[str, dict[str, str]] = {}
    for repeat in range(options.repeats):
        for way in runs:
            folder = out / f"{way}_{repeat}"
            line = ["run", f"model.path={Path(options.model).absolute()}", f"input={out / 'rows.jsonl'}"]
            line += [f"out={folder}", "batch.order=arrival", f"engine.kv_cache={way}", "quant.kernel=openvino_graph"]
            if way == "slots":
                line += [f"workload.sequences={options.slots}"]
            else:
                pool = read_plan(out / "slots_0" / "plan.json").cache_positions
                rows = options.slots if options.equal else options.rows
                line += [f"workload.sequences={rows}", f"workload.pool_positions={pool}"]
            subprocess.run([sys.executable, "-m", "ds_llmpq", *line, *arguments], check=True, stdout=subprocess.DEVNULL)
            kv = sum(stage.memory_bytes.kv for stage in read_plan(folder / "plan.json").stages)
            metrics = json.loads((folder / "metrics.json").read_text())
            passes = metrics["order"]["decode_passes"]
            runs[way].append(metrics["measured"] | {"kv": kv, "passes": passes, "predicted": find_predicted(metrics)})
            results = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
            answers[way] = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in results}
    table = [
        [
            way,
            f"{median(run['throughput_tokens_per_second'] for run in found):.1f}",
            f"{median(run['predicted'] for run in found):.1f}",
            f"{median(run['prefill_seconds'] for run in found):.2f}",
            f"{median(run['decode_seconds'] for run in found):.2f}",
            f"{found[0]['kv'] / 1e6:.0f}",
            str(found[0]["passes"]),
            f"{found[0]['preemptions']} ({found[0]['recomputed_tokens']} tokens again)",
        ]
        for way, found in runs.items()
    ]
    head = ["", "output tokens/s", "predicted", "prefill s", "decode s", "KV cache MB", "decode passes", "preempted"]
    same = sum(answers["paged"][name] == text for name, text in answers["slots"].items())
    text = f"{format_table(head, table)}\n{same} of {options.requests} answers are the same"
    print(text)
    (out / "summary.txt").write_text(text + "\n")


def find_predicted(metrics: dict) -> float:
    """Output tokens/s by the plan's times, for the same requests and answers."""
    seconds = metrics["predicted_against_measured"]["latency_seconds"]["predicted"]
    return metrics["measured"]["generated_tokens"] / seconds


def write_rows(options: argparse.Namespace, file: Path) -> None:
    draw, shape = random.Random(0), read_shape(options.model)
    share = min(1.0, (shape.max_positions or 1536) / 1536)
    with file.open("w") as rows:
        for index in range(options.requests):
            prompt, answer = (
                max(1, int(share * min(most, typical * (1.0 if options.equal else draw.lognormvariate(0, 1.0)))))
                for typical, most in ((120, 1024), (180, 512))
            )
            ids = [draw.randrange(3, shape.vocab) for _ in range(prompt)]
            body = {"model": "m", "prompt": ids, "max_tokens": answer, "ignore_eos": True, "temperature": 0}
            row = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
