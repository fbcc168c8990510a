"""Tunes planner.theta to a quality target with Optuna: the fastest plan that promises to lose no more than so much.

    pip install optuna
    python scripts/tune_theta.py --target 0.01 --trials 12 --out runs/tuned +experiment=paper

All further arguments are overrides of `ds-llmpq plan`. Each trial's plan lies in its own folder of OUT; OUT/study.json
lists them. `planner.mode=max_quality_loss` finds such a plan directly, with a bound: this shows how to tune a key that
has no mode of its own (an objective of several runs, a measured loss).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from ds_llmpq import config
from ds_llmpq.errors import UserError
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import make_plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, required=True, help="predicted loss, nats per token")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments, overrides = parser.parse_known_args()
    try:
        import optuna
    except ImportError:
        print("error: Optuna is not installed; pip install optuna", file=sys.stderr)
        return 1
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        settings = config.load_cluster(config.to_object(config.compose_settings("plan", overrides), PlanConfig))
        found = tune(optuna, settings, arguments.target, arguments.trials, arguments.seed, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"theta={found['theta']:.4g}: {found['throughput_tokens_per_second']:.4g} tokens/s, predicted loss "
        f"{found['quality_loss']:.3g} (target {arguments.target:g}), {arguments.out / found['folder'] / 'plan.json'}"
    )
    return 0


def tune(optuna, settings: PlanConfig, target: float, trials: int, seed: int, out: Path) -> dict:
    """The fastest trial that keeps the target. `UserError`: none does."""
    tried: list[dict] = []
    settings.planner.max_quality_loss = None  # theta alone shall find it

    def latency(trial) -> float:
        settings.planner.theta = trial.suggest_float("theta", 1e-3, 1e6, log=True)
        folder = out / f"trial{trial.number}"
        folder.mkdir(parents=True, exist_ok=True)
        predicted = make_plan(settings, folder).predicted
        tried.append({"theta": settings.planner.theta, "folder": folder.name, **asdict(predicted)})
        over = max(0.0, predicted.quality_loss / target - 1.0)
        return predicted.latency_seconds * (1.0 + 10.0 * over)  # a penalty that leads back to the target

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({"theta": 1e6})  # the least loss: whether the target can be kept at all
    study.optimize(latency, n_trials=trials)
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(tried, indent=1) + "\n")
    kept = [entry for entry in tried if entry["quality_loss"] <= target]
    if not kept:
        least = min(entry["quality_loss"] for entry in tried)
        raise UserError(f"No trial lost as little as {target:g}; the least was {least:.3g}: raise --target to that.")
    return min(kept, key=lambda entry: entry["latency_seconds"])


if __name__ == "__main__":
    sys.exit(main())
