"""What theta buys: plans over planner.theta, each distinct one run and evaluated; measured quality against throughput.

    ds-llmpq sensitivity out=o/variance
    python scripts/theta_sweep.py OUT planner.sensitivity=o/variance/sensitivity.json \\
        [--thetas 0.01 0.1 1 10 100] [--repeats 3]

All further arguments are overrides of `ds-llmpq plan` (default: the small model on two CPU processes with little
memory, widths 2, 3, 4, 8, 16). Every plan runs the same prompts, `--repeats` times, plans taking turns; `evaluate`
measures its loss on text. Writes theta.csv and theta.png, prints the table. OUT keeps what is done, and an interrupted
sweep goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from ds_llmpq import config
from ds_llmpq.errors import UserError
from ds_llmpq.plan import read_plan
from ds_llmpq.report import figures
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import make_plan

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = (
    "model=tiny", "cluster=local_cpu2", "workload=demo", "quant.bits=[2,3,4,8,16]", "quant.kernel=openvino",
    "planner.max_quality_loss=null", "planner.least_gain=0",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--thetas", type=float, nargs="+", default=[0.01, 0.1, 1, 10, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--input", default=None, help="batch file; default: 64 prompts as the workload has them")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens that quality is measured on")
    arguments, overrides = parser.parse_known_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    try:
        plans = distinct_plans(arguments.thetas, [*DEFAULTS, *overrides], out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    input_file = Path(arguments.input).absolute() if arguments.input else written_prompts(out, plans[0])
    for repeat in range(arguments.repeats):
        for row in plans:
            called("run", [f"plan={row['file']}", f"input={input_file}", f"out={row['file'].parent / f'run{repeat}'}"])
    for row in plans:
        limited = [f"plan={row['file']}", f"evaluation.limit_tokens={arguments.tokens}"]
        called("evaluate", [*limited, f"out={row['file'].parent / 'quality'}"])
    rows = [measured(row, arguments.repeats) for row in plans]
    with open(out / "theta.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "theta.png")
    print(format_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))
    print(f"plot: {out / 'theta.png'}; load averages {', '.join(f'{value:.1f}' for value in os.getloadavg())}")
    return 0


def distinct_plans(thetas: list[float], overrides: list[str], out: Path) -> list[dict[str, Any]]:
    """One entry a plan: its file, and the thetas that led to it."""
    settings = config.load_cluster(config.to_object(config.compose_settings("plan", overrides), PlanConfig))
    found: dict[str, dict[str, Any]] = {}
    for theta in sorted(thetas):
        folder = out / f"theta{theta:g}"
        folder.mkdir(exist_ok=True)
        settings.planner.theta = theta
        file = folder / "plan.json"
        plan = read_plan(file) if file.is_file() else make_plan(settings, folder)
        same = json.dumps([asdict(plan.micro_batch), [(s.device, s.layers, s.bits) for s in plan.stages]], default=list)
        found.setdefault(same, {"thetas": [], "plan": plan, "file": file})["thetas"].append(theta)
    return list(found.values())


def written_prompts(out: Path, row: dict[str, Any]) -> Path:
    """Prompts of the planned length that all generate as much as planned, for four batches."""
    workload = row["plan"].workload
    bodies = [
        {
            "prompt": [8 + (7 * index + 11 * place) % 200 for place in range(workload.prompt_tokens)],
            "max_tokens": workload.generated_tokens,
            "ignore_eos": True,
        }
        for index in range(4 * workload.sequences)
    ]
    rows = [
        {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
        for index, body in enumerate(bodies)
    ]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out / "prompts.jsonl"


def called(command: str, arguments: list[str]) -> None:
    """`ds-llmpq COMMAND` in a process of its own, unless its folder says that it ended."""
    out = Path(arguments[-1].removeprefix("out="))
    if (out / ("metrics.json" if command == "run" else "scores.json")).is_file():
        return
    print(f"{command}: {out}", flush=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", "ds_llmpq", command, *arguments]
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command} failed: {done.stderr.strip()[-2000:]}")


def measured(row: dict[str, Any], repeats: int) -> dict[str, Any]:
    plan, folder = row["plan"], row["file"].parent
    runs = [json.loads((folder / f"run{repeat}" / "metrics.json").read_text())["measured"] for repeat in range(repeats)]
    throughput = sorted(run["throughput_tokens_per_second"] for run in runs)
    scores = json.loads((folder / "quality" / "scores.json").read_text())
    bits = [width for stage in plan.stages for width in stage.bits]
    return {
        "theta": " ".join(f"{theta:g}" for theta in row["thetas"]),
        "bits": " ".join("-".join(map(str, stage.bits)) for stage in plan.stages),
        "average bits": sum(bits) / len(bits),
        "tokens/s": median(throughput),
        "least": throughput[0],
        "most": throughput[-1],
        "predicted tokens/s": plan.predicted.throughput_tokens_per_second,
        "loss increase": scores["loss_increase"]["measured"],
        "standard error": scores["loss_increase"]["standard_error"],
        "predicted loss": plan.predicted.quality_loss,
        "perplexity": scores["perplexity_per_token"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured and predicted points, joined in the order of theta."""
    figure, [axes] = figures.make_figure(1, 2, width=10, height=3.8)
    for axis, speed, loss, name in (
        (axes[0], "tokens/s", "loss increase", "measured"),
        (axes[1], "predicted tokens/s", "predicted loss", "predicted"),
    ):
        axis.plot([row[speed] for row in rows], [row[loss] for row in rows], "o-", color=figures.STAGES[0])
        if name == "measured":
            spread = [[row[speed] - row["least"] for row in rows], [row["most"] - row[speed] for row in rows]]
            errors = [row["standard error"] for row in rows]
            axis.errorbar(
                [row[speed] for row in rows], [row[loss] for row in rows], errors, spread, fmt="none",
                color=figures.OTHER,
            )  # fmt: skip
        for row in rows:
            axis.annotate(row["theta"], (row[speed], row[loss]), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axis.set(xlabel=f"{name} tokens/s", ylabel="loss increase (nats/token)", title=f"{name}, by theta")
    figures.save_figure(figure, path)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
