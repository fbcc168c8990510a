"""Does an indicator pick well? Plans of equal size by each sensitivity.json, and what they really lose.

    ds-llmpq sensitivity method=measured out=o/measured      (and variance, hessian)
    python scripts/indicator_experiment.py OUT o/{measured,variance,hessian}/sensitivity.json

For each budget of average bits the layers' widths with the smallest predicted loss are found exactly, for each given
table and for random ones (seeds 0 to 4, scaled like the first table), and all plans are measured on text that
calibrated none of them. Writes plans.csv, ranks.csv, plans.png and prints tables.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from ds_llmpq.config import asset
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.corpus import EVALUATION, read_text, select_calibration_rows
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.sensitivity.indicators import draw_table
from ds_llmpq.sensitivity.layerwise import Layerwise, LossIncrease, measure
from ds_llmpq.sensitivity.table import Sensitivity, read_sensitivity

SEEDS = range(5)


@dataclass(frozen=True)
class Choice:
    """The widths a method chose for a budget, and what it predicts."""

    method: str
    budget: float
    bits: tuple[int, ...]
    predicted: float


def best_bits(table: Sensitivity, budget: float) -> tuple[int, ...]:
    """Widths with the smallest sum of table and an average of at most `budget` bits (layers of equal size), exactly."""
    most = round(budget * table.layers)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in table.table:
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (loss, bits) in best.items():
            for width, value in zip(table.bits, row, strict=True):
                total = used + width
                if total <= most and (total not in following or loss + value < following[total][0]):
                    following[total] = (loss + value, (*bits, width))
        best = following
    return min(best.values())[1]


def predicted(table: Sensitivity, bits: tuple[int, ...]) -> float:
    return sum(row[table.bits.index(width)] for row, width in zip(table.table, bits, strict=True))


def random_sensitivity(like: Sensitivity, seed: int) -> Sensitivity:
    """Random importance of layers, its columns summing to those of `like`."""
    raw = draw_table(like.layers, list(like.bits), seed)
    sums = [
        (sum(own), sum(target))
        for own, target in zip(zip(*raw, strict=True), zip(*like.table, strict=True), strict=True)
    ]
    rows = tuple(tuple(v * t / s for v, (s, t) in zip(row, sums, strict=True)) for row in raw)
    return Sensitivity("random", "assumed", like.bits, rows)


def choices(tables: list[Sensitivity], budgets: list[float]) -> list[Choice]:
    named = [(name_of(table), table) for table in tables]
    named += [(f"random {seed}", random_sensitivity(tables[0], seed)) for seed in SEEDS]
    return [
        Choice(name, budget, bits, predicted(table, bits))
        for budget in budgets
        for name, table in named
        for bits in [best_bits(table, budget)]
    ]


def name_of(table: Sensitivity) -> str:
    estimate = (table.details or {}).get("hessian_estimate")
    return f"hessian, {estimate}" if table.method == "hessian" and estimate else table.method


def ranks(tables: list[Sensitivity]) -> list[dict]:
    """Spearman's rank correlation of each table with the measured one, over all cells and within each width."""
    truth = next(each for each in tables if each.method == "measured")
    found = []
    for each in [*tables, *(random_sensitivity(truth, seed) for seed in SEEDS)]:
        own, true = each.select_bits(truth.bits), truth.table
        row = {"method": name_of(each), "all": spearmanr(sum(own, ()), sum(true, ())).statistic}
        for column, width in enumerate(truth.bits):
            pair = ([cells[column] for cells in own], [cells[column] for cells in true])
            row[f"{width} bits"] = spearmanr(*pair).statistic
        row["seconds"] = (each.details or {}).get("indicator_seconds", 0.0)
        found.append(row)
    return found


def measured_plans(args, chosen: list[Choice]) -> tuple[dict[tuple[int, ...], LossIncrease], float]:
    """What every chosen plan loses on the evaluation text, and the loss at full precision."""
    quant = QuantConfig(group_size=args.group_size)
    tokenizer = load_tokenizer(args.model)
    tokens = select_calibration_rows(read_text(args.text, EVALUATION), tokenizer, args.rows, args.tokens)
    model = Layerwise(Checkpoint(args.model), quant, tokens, torch.device(args.device))
    bar = tqdm(desc="measure", unit="layer")

    def on_layer(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    found = measure(model, [choice.bits for choice in chosen], on_layer)
    bar.close()
    return found, full_loss(model)


@torch.inference_mode()
def full_loss(model: Layerwise) -> float:
    hidden, head = model.embed(), model.head()
    for index in range(model.layers):
        hidden = model.run_layer(model.layer(index), hidden)
    losses = [
        torch.nn.functional.cross_entropy(model.compute_logits(head, hidden[row : row + 1])[0], model.targets[row])
        for row in range(len(hidden))
    ]
    return float(torch.stack(losses).mean())


def plan_rows(chosen: list[Choice], found: dict[tuple[int, ...], LossIncrease], base: float) -> list[dict]:
    return [
        {
            "budget": choice.budget,
            "method": choice.method,
            "bits": "-".join(map(str, choice.bits)),
            "predicted": choice.predicted,
            "loss_increase": found[choice.bits].loss,
            "standard_error": found[choice.bits].loss_error,
            "kl": found[choice.bits].kl,
            "perplexity": 2.718281828459045 ** (base + found[choice.bits].loss),
        }
        for choice in chosen
    ]


def by_budget(rows: list[dict]) -> list[list[str]]:
    """Perplexity by budget and method; random as mean and range over its seeds."""
    methods = list(dict.fromkeys(row["method"] for row in rows if not row["method"].startswith("random")))
    lines = []
    for budget in sorted({row["budget"] for row in rows}):
        here = [row for row in rows if row["budget"] == budget]
        line = [f"{budget:g}"]
        line += [f"{row['perplexity']:.4f}" for method in methods for row in here if row["method"] == method]
        lucky = [row["perplexity"] for row in here if row["method"].startswith("random")]
        lines.append([*line, f"{statistics.mean(lucky):.4f} ({min(lucky):.4f} to {max(lucky):.4f})"])
    return [["average bits", *methods, "random, mean of 5"], *lines]


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    budgets = sorted({row["budget"] for row in rows})
    label = {row["method"]: "random" if row["method"].startswith("random") else row["method"] for row in rows}
    for method in dict.fromkeys(label.values()):
        own = [row for row in rows if label[row["method"]] == method]
        means = [statistics.mean(row["perplexity"] for row in own if row["budget"] == budget) for budget in budgets]
        left.plot(budgets, means, marker="o", label=method)
        right.plot([row["predicted"] for row in own], [max(row["kl"], 1e-7) for row in own], "o", label=method)
    left.set(xlabel="average bits of the decoder layers", ylabel="perplexity per token")
    right.set(
        xlabel="predicted loss increase (nats/token)", ylabel="measured KL (nats/token)", xscale="log", yscale="log"
    )
    right.axline((1e-3, 1e-3), (1e-1, 1e-1), color="grey", linewidth=0.8)
    left.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write_csv(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("tables", nargs="+", type=Path, help="sensitivity.json of each method; one must be measured")
    parser.add_argument("--model", default=asset("tiny-llama"))
    parser.add_argument("--text", default=None, help="a UTF-8 file; default: the standard library's held-out files")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--budgets", type=float, nargs="+", default=[3, 3.5, 4, 5, 6])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    tables = [read_sensitivity(file) for file in args.tables]
    chosen = choices(tables, args.budgets)
    found, base = measured_plans(args, chosen)
    rows = plan_rows(chosen, found, base)
    write_csv(args.out_dir / "plans.csv", rows)
    correlations = ranks(tables)
    write_csv(args.out_dir / "ranks.csv", correlations)
    plot(rows, args.out_dir / "plans.png")
    head, *lines = by_budget(rows)
    print(f"perplexity per token on {args.rows * args.tokens} tokens; full precision {2.718281828459045**base:.4f}")
    print(format_table(head, lines))
    print(
        format_table(
            list(correlations[0]), [[v if isinstance(v, str) else f"{v:.3f}" for v in r.values()] for r in correlations]
        )
    )


if __name__ == "__main__":
    main()
