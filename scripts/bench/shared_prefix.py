"""A batch whose prompts begin with the same tokens, with and without `engine.share_prefix`, in turns.

    python scripts/make_checkpoint.py --preset 135m MODEL
    python scripts/bench/shared_prefix.py MODEL OUT [--requests 64] [--shared 512] [--own 64] [--generate 64]
                                          [--repeats 3] [ARGUMENTS of `ds-llmpq run` ...]

Answers are greedy, of one length. Medians over the repeats of output tokens/s and of seconds in prefill and decode; the
answers of both ways are compared, which are the same in float32 (`engine.dtype=float32`) and may differ in a near-tie
elsewhere.
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
from ds_llmpq.report.plan_table import format_table

WAYS = ("false", "true")  # engine.share_prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    for name, default in (("requests", 64), ("shared", 512), ("own", 64), ("generate", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options, arguments = parser.parse_known_args()
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    write_rows(options, out / "rows.jsonl")
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    answers: dict[str, dict[str, str]] = {}
    for repeat in range(options.repeats):
        for way in WAYS:
            folder = out / f"share_{way}_{repeat}"
            line = ["run", f"model.path={Path(options.model).absolute()}", f"input={out / 'rows.jsonl'}"]
            line += [f"out={folder}", f"engine.share_prefix={way}", "batch.order=arrival", *arguments]
            subprocess.run([sys.executable, "-m", "ds_llmpq", *line], check=True, stdout=subprocess.DEVNULL)
            stages = json.loads((folder / "plan.json").read_text())["stages"]
            kv = sum(stage["memory_bytes"]["kv"] for stage in stages)
            runs[way].append(json.loads((folder / "metrics.json").read_text())["measured"] | {"kv": kv})
            rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
            answers[way] = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    table = [
        [
            f"share_prefix={way}",
            f"{median(run['throughput_tokens_per_second'] for run in found):.1f}",
            f"{median(run['prefill_seconds'] for run in found):.2f}",
            f"{median(run['decode_seconds'] for run in found):.2f}",
            f"{found[0]['kv'] / 1e6:.0f}",
            str(found[0]["prefill_tokens"]),
            str(found[0]["shared_tokens"]),
        ]
        for way, found in runs.items()
    ]
    head = ["", "output tokens/s", "prefill s", "decode s", "KV cache MB", "prompt tokens computed", "shared"]
    same = sum(answers["true"][name] == text for name, text in answers["false"].items())
    text = f"{format_table(head, table)}\n{same} of {options.requests} answers are the same"
    print(text)
    (out / "summary.txt").write_text(text + "\n")


def write_rows(options: argparse.Namespace, file: Path) -> None:
    draw, vocabulary = random.Random(0), read_shape(options.model).vocab
    shared = [draw.randrange(3, vocabulary) for _ in range(options.shared)]
    with file.open("w") as rows:
        for index in range(options.requests):
            prompt = [*shared, *(draw.randrange(3, vocabulary) for _ in range(options.own))]
            body = {"model": "m", "prompt": prompt, "max_tokens": options.generate, "ignore_eos": True}
            row = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
