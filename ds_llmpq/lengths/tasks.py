"""What a predictor learns: targets from lengths, and lengths from targets. All numbers come from the training data.

regression           log(1 + tokens), standardized; loss l1 or quantile: the median, mse: the mean
binary, multiclass   the class between percentiles that a length falls into, decoded to the mean length of the class
*_ordinal            the class index as a number, rounded
pairwise             a score that is higher for the longer answer of a pair
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import MaxLen

from ds_llmpq.errors import UserError
from ds_llmpq.lengths.config import LengthTaskConfig
from ds_llmpq.validation import AboveZero, Amount, Many, Number, Share, Some, one_of

KINDS = ("regression", "binary", "multiclass", "multiclass_ordinal", "binary_ordinal", "pairwise")
LOSSES = ("l1", "mse", "quantile")
_PERCENTILES = {"binary": (50.0,), "multiclass": (25.0, 50.0, 75.0, 99.0)}


@dataclass(frozen=True)
class LengthTask:
    """Class c of C holds lengths in (thresholds[c - 1], thresholds[c]], class_tokens[c] on average. `location` and
    `scale` standardize log(1 + tokens)."""

    kind: one_of(*KINDS)
    loss: one_of(*LOSSES)
    quantiles: Annotated[Many[Share], MaxLen(100)]
    thresholds: Annotated[Many[Amount], MaxLen(1000)]
    class_tokens: Annotated[Some[Amount], MaxLen(1000)]
    location: Number
    scale: AboveZero

    def check(self) -> None:
        """ValueError if its numbers contradict each other."""
        if len(self.class_tokens) != len(self.thresholds) + 1:
            raise ValueError("there must be one class more than thresholds")
        if list(self.thresholds) != sorted(self.thresholds):
            raise ValueError("thresholds must rise")

    @classmethod
    def fit(cls, config: LengthTaskConfig, tokens: np.ndarray) -> LengthTask:
        """From the lengths [n] of the training data. `UserError`: a setting that does not exist."""
        if config.kind not in KINDS or config.loss not in LOSSES:
            raise UserError(
                f"task.kind is {config.kind!r} and task.loss is {config.loss!r}, but they must be one of "
                f"{', '.join(KINDS)} and {', '.join(LOSSES)}."
            )
        if any(not 0.5 < level < 1 for level in config.quantiles):
            raise UserError(f"task.quantiles is {config.quantiles} but each must lie between 0.5 and 1.")
        percentiles = config.percentiles or _PERCENTILES["binary" if config.kind.startswith("binary") else "multiclass"]
        if list(percentiles) != sorted(set(percentiles)) or not 0 < percentiles[0] <= percentiles[-1] < 100:
            raise UserError(f"task.percentiles is {list(percentiles)} but must rise from above 0 to below 100.")
        # distinct lengths that occur, below the longest, so that no class is empty
        thresholds = np.unique(np.percentile(tokens, percentiles, method="lower"))
        thresholds = thresholds[thresholds < tokens.max()]
        if not len(thresholds) and config.kind not in ("regression", "pairwise"):
            raise UserError(
                f"All of task.percentiles {list(percentiles)} fall on the longest training answer ({tokens.max():g} "
                "tokens), so there is nothing to tell apart; give lower ones."
            )
        labels = np.digitize(tokens, thresholds, right=True)
        means = [float(tokens[labels == label].mean()) for label in range(len(thresholds) + 1)]
        logs = np.log1p(tokens)
        return cls(
            config.kind,
            config.loss,
            tuple(sorted(config.quantiles)),
            tuple(thresholds.tolist()),
            tuple(means),
            float(logs.mean()),
            float(logs.std()) or 1.0,
        )

    @property
    def is_classifying(self) -> bool:
        return self.kind in ("binary", "multiclass")

    @property
    def is_ordinal(self) -> bool:
        return self.kind.endswith("_ordinal")

    @property
    def has_classes(self) -> bool:
        return self.is_classifying or self.is_ordinal

    def labels(self, tokens: np.ndarray) -> np.ndarray:
        """Class [n] of lengths [n]."""
        return np.digitize(tokens, self.thresholds, right=True)

    def targets(self, tokens: np.ndarray) -> np.ndarray:
        """What a regression learns, [n]. For `pairwise` any increasing function of the length would do."""
        if self.is_ordinal:
            return self.labels(tokens).astype(float)
        return (np.log1p(tokens) - self.location) / self.scale

    def tokens(self, targets: np.ndarray) -> np.ndarray:
        """Lengths [n] of regression targets [n], at least one token."""
        # the bound e^20 only keeps exp from overflowing
        return np.maximum(np.expm1(np.minimum(targets * self.scale + self.location, 20.0)), 1.0)

    def nearest_class(self, targets: np.ndarray) -> np.ndarray:
        """Class [n] of ordinal targets [n]."""
        return np.clip(np.rint(targets), 0, len(self.class_tokens) - 1).astype(int)
