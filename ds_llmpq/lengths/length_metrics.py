"""How good length predictions are."""

from __future__ import annotations

import numpy as np

_PAIRS = 20_000


def measure_regression(true: np.ndarray, predicted: np.ndarray, seed: int = 0) -> dict[str, float]:
    """MAE and RMSE in tokens, Kendall's tau-b, and the share of pairs whose longer answer is predicted to be longer
    (ties count half, pairs of equal length not at all)."""
    from scipy.stats import kendalltau  # half a second to import, which plans and runs need not wait for

    error = predicted - true
    tau = kendalltau(true, predicted).statistic
    return {
        "mae_tokens": float(np.abs(error).mean()),
        "rmse_tokens": float(np.sqrt((error**2).mean())),
        "kendall_tau": 0.0 if np.isnan(tau) else float(tau),
        "pairwise_accuracy": pairwise_accuracy(true, predicted, seed),
    }


def pairwise_accuracy(true: np.ndarray, predicted: np.ndarray, seed: int = 0) -> float:
    """Over all pairs, or 20,000 random ones."""
    count = len(true)
    if count * (count - 1) // 2 <= _PAIRS:
        left, right = np.triu_indices(count, 1)
    else:
        left, right = np.random.default_rng(seed).integers(0, count, (2, _PAIRS))
    differ = true[left] != true[right]
    left, right = left[differ], right[differ]
    if not len(left):
        return 0.5
    agreement = np.sign(true[left] - true[right]) * np.sign(predicted[left] - predicted[right])
    return float((1 + agreement).mean() / 2)


def measure_classes(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, within-one accuracy, and precision, recall and F1 averaged over classes that occur in either."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)
    return {
        "accuracy": float((true == predicted).mean()),
        "within_one_accuracy": float((np.abs(true - predicted) <= 1).mean()),
        "macro_precision": float(precision),
        "macro_recall": float(recall),
        "macro_f1": float(f1),
    }


def measure_bounds(true: np.ndarray, bounds: dict[str, np.ndarray]) -> dict[str, float]:
    """For each bound (q90, q95): the share of answers within it, which should be its level, and its mean in tokens."""
    found = {}
    for name, bound in bounds.items():
        found[f"{name}_coverage"] = float((true <= bound).mean())
        found[f"{name}_mean_tokens"] = float(bound.mean())
    return found
