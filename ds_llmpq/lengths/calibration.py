"""Turns a model's scores into tokens and upper bounds, fitted on validation data (split conformal prediction)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from ds_llmpq.lengths.tasks import LengthTask
from ds_llmpq.validation import Amount, Many, Number

Offset = Annotated[float, Ge(-700), Le(700)]  # of a logarithm: its exponential is a float

_FEWEST = 20  # validation examples of a class before its own quantiles are trusted


def name_level(level: float) -> str:
    """`q90` of 0.9."""
    return f"q{100 * level:g}"


def find_conformal_quantile(values: np.ndarray, level: float) -> float:
    """The ceil((n + 1) level)-th smallest of n values, which is an upper bound of a new one with at least that
    probability."""
    rank = min(int(np.ceil((len(values) + 1) * level)), len(values))
    return float(np.sort(values)[rank - 1])


@dataclass(frozen=True)
class Calibration:
    """`offsets` [levels] are added to log(1 + base bound). `class_bounds` [classes][levels] are in tokens. `scores` and
    `tokens` are knots of the increasing map from pairwise scores to tokens. `factor` multiplies regressed tokens. No
    bound is above the `longest` validation answer."""

    offsets: Many[Offset] = ()
    class_bounds: Many[Many[Amount]] = ()
    scores: Many[Number] = ()
    tokens: Many[Amount] = ()
    factor: Amount = 1.0
    longest: Amount | None = None

    def check(self, task: LengthTask) -> None:
        """ValueError if it does not fit `task`."""
        levels = len(task.quantiles)
        if task.has_classes:
            if [len(row) for row in self.class_bounds] != [levels] * len(task.class_tokens):
                raise ValueError("class_bounds must hold one bound for each class and quantile")
        elif self.class_bounds or len(self.offsets) != levels:
            raise ValueError("offsets must hold one number for each quantile")
        if task.kind == "pairwise" and not (self.scores and len(self.scores) == len(self.tokens)):
            raise ValueError("scores and tokens must be of one length, at least 1")

    @classmethod
    def fit(cls, task: LengthTask, scores: np.ndarray, tokens: np.ndarray) -> Calibration:
        """From validation scores [n, k] and true lengths [n]."""
        if task.has_classes:
            bounds = _bound_classes(task, decode_classes(task, scores), tokens)
            return cls(class_bounds=bounds, longest=float(tokens.max()))
        base = cls()
        if task.kind == "pairwise":
            base = cls(scores=(knots := _fit_monotone(scores[:, 0], tokens))[0], tokens=knots[1])
        elif task.loss == "mse":  # exp of a mean logarithm is a median; this corrects it to the mean
            base = cls(factor=float(tokens.mean() / base.point(task, scores).mean()))
        offsets = []
        for place, level in enumerate(task.quantiles):
            errors = np.log1p(tokens) - np.log1p(base._base_bound(task, scores, place))
            offsets.append(find_conformal_quantile(errors, level))
        return cls(tuple(offsets), (), base.scores, base.tokens, base.factor, float(tokens.max()))

    def point(self, task: LengthTask, scores: np.ndarray) -> np.ndarray:
        """Predicted tokens [n]."""
        if task.has_classes:
            return np.array(task.class_tokens)[decode_classes(task, scores)]
        if task.kind == "pairwise":
            return np.interp(scores[:, 0], self.scores, self.tokens)
        return np.maximum(task.tokens(scores[:, 0]) * self.factor, 1.0)

    def bounds(self, task: LengthTask, scores: np.ndarray) -> dict[str, np.ndarray]:
        """Upper bounds [n] by name (`q90`); a higher level never has a lower bound."""
        found, lower = {}, np.ones(len(scores))
        for place, level in enumerate(task.quantiles):
            if self.class_bounds:
                bound = np.array(self.class_bounds)[decode_classes(task, scores), place]
            else:
                bound = np.expm1(np.log1p(self._base_bound(task, scores, place)) + self.offsets[place])
            lower = np.maximum(bound if self.longest is None else np.minimum(bound, self.longest), lower)
            found[name_level(level)] = lower
        return found

    def _base_bound(self, task: LengthTask, scores: np.ndarray, place: int) -> np.ndarray:
        """The model's own quantile if it has one (a column after the point prediction), else the point prediction."""
        if task.kind == "regression" and scores.shape[1] > 1 + place:
            return task.tokens(scores[:, 1 + place])
        return self.point(task, scores)


def decode_classes(task: LengthTask, scores: np.ndarray) -> np.ndarray:
    """Class [n] from the scores of a classifying (logits [n, C]) or ordinal (index [n, 1]) model."""
    return task.nearest_class(scores[:, 0]) if task.is_ordinal else scores.argmax(1)


def _bound_classes(task: LengthTask, predicted: np.ndarray, tokens: np.ndarray) -> tuple[tuple[float, ...], ...]:
    rows = []
    for label in range(len(task.class_tokens)):
        own = tokens[predicted == label]
        values = own if len(own) >= _FEWEST else tokens
        rows.append(tuple(find_conformal_quantile(values, level) for level in task.quantiles))
    return tuple(rows)


def _fit_monotone(scores: np.ndarray, tokens: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots of the best increasing step function of scores."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression().fit(scores, tokens)
    return tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist())
