"""What the benchmarks of scheduling share: requests of known lengths, a predictor, a plan of few slots, runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from ds_llmpq.config import asset
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.tokenizer import load_tokenizer
from scripts.make_length_data import SyntheticAnswer, make_answers

ROOT = Path(__file__).resolve().parents[2]
MODEL = asset("tiny-llama")
_ALL_MEAN_TOKENS = 198.0  # of `make_answers`


def scaled_answers(count: int, seed: int, mean_tokens: float, longest: int) -> list[SyntheticAnswer]:
    """Synthetic prompts whose lengths depend on what they say, shortened alike to about `mean_tokens` on average."""
    share = mean_tokens / _ALL_MEAN_TOKENS

    def cut(tokens: float) -> int:
        return int(np.clip(round(tokens * share), 1, longest))

    return [
        SyntheticAnswer(each.text, each.model, cut(each.output_tokens), cut(each.median_tokens))
        for each in make_answers(count, seed)
    ]


def drawn_lengths(count: int, mean: float, longest: int) -> list[int]:
    """Exponential, cut off (not clipped) at `longest`, with that mean. 177 of at most 512: the 99th percentile is 497,
    and the longest of 8, 16, 32 have 391, 438, 471 on average, close to what was measured of real chats."""

    def excess(rate: float) -> float:
        return 1 / rate - 1 / math.expm1(rate) - mean / longest

    rate = brentq(excess, 1e-6, 500.0)  # mean of an exponential of this rate that is cut off at 1
    drawn = -np.log1p(np.random.default_rng(0).random(count) * math.expm1(-rate)) / rate
    return [max(1, round(x * longest)) for x in drawn]


def request(name: str, prompt: str | list[dict[str, str]], max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A row of a batch file; further `fields` of its body, but for arrival_seconds, which is the row's own."""
    arrival = fields.pop("arrival_seconds", None)
    chat = not isinstance(prompt, str)
    url = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"messages" if chat else "prompt": prompt, "max_tokens": max_tokens} | fields
    row = {"custom_id": name, "method": "POST", "url": url, "body": body}
    return row if arrival is None else row | {"arrival_seconds": arrival}


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained_predictor(folder: Path, count: int, seed: int, mean_tokens: float, longest: int) -> Path:
    """By `lengths train` on a draw of its own; prompts are counted with the model's tokenizer, as a run counts them."""
    if not (folder / "predictor.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(MODEL, False)
        rows = [
            {
                "prompt": each.text,
                "model": each.model,
                "output_tokens": each.output_tokens,
                "prompt_tokens": len(tokenizer(each.text)["input_ids"]),
            }
            for each in scaled_answers(count, seed, mean_tokens, longest)
        ]
        data = write_lines(folder / "answers.jsonl", rows)
        called("lengths", ["action=train", f"data={data}", f"out={folder}"], folder)
    return folder


def hand_plan(folder: Path, slots: int, prompt_tokens: int, generated_tokens: int) -> Path:
    """Two stages of one thread each, unquantized, half of the slots in each decode group."""
    file = folder / "plan" / "plan.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        layers = read_shape(MODEL).layers
        cuts = [0, layers // 2, layers]
        stages = [
            {"device": f"localhost:{index}", "layers": [first, last], "bits": [16] * (last - first)}
            for index, (first, last) in enumerate(pairwise(cuts))
        ]
        hand = {"stages": stages, "micro_batch": {"prefill": min(4, slots), "decode": max(1, slots // 2)}}
        (folder / "hand.json").write_text(json.dumps(hand))
        workload = {"sequences": slots, "prompt_tokens": prompt_tokens, "generated_tokens": generated_tokens}
        sizes = [f"workload.{name}={value}" for name, value in workload.items()]
        options = [f"model.path={MODEL}", "cluster=local_cpu2", f"check={folder / 'hand.json'}", f"out={file.parent}"]
        called("plan", [*options, *sizes], folder)
    return file


def run_metrics(plan: Path, requests: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """metrics.json of `ds-llmpq run`; of the run that is there already, if it ended."""
    if not (out / "metrics.json").is_file():
        called("run", [f"plan={plan}", f"input={requests}", f"out={out}", *overrides], out.parent)
    return json.loads((out / "metrics.json").read_text())


def called(command: str, arguments: Sequence[str], folder: Path) -> None:
    """`ds-llmpq COMMAND ARGUMENTS` in a process of its own. What it says goes to a log, and here if it failed."""
    line = [sys.executable, "-m", "ds_llmpq", command, *arguments]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(line, env=os.environ | own, capture_output=True, text=True, check=False)
    with open(folder / "log", "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(line)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        sys.exit(f"{command} failed: {done.stderr.strip()[-2000:]}")


def load_of_machine() -> str:
    return f"load averages {', '.join(f'{value:.1f}' for value in os.getloadavg())} on {os.cpu_count()} processors"
