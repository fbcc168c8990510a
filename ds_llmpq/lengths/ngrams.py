"""The default predictor: linear models of hashed n-grams, prompt length and a few counts. It needs no download.

Ridge regression on log lengths; quantile regressions over its out-of-fold prediction and the counts give the median
and the upper quantiles. Classes: logistic regression. Pairs: logistic regression on differences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Le, MaxLen, MinLen
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import open_regular
from ds_llmpq.lengths.config import ProxyConfig
from ds_llmpq.lengths.dataset import TRUNCATIONS, collect_lengths, truncate
from ds_llmpq.lengths.records import MOST_TOKENS, WORD, Example
from ds_llmpq.lengths.tasks import LengthTask
from ds_llmpq.validation import AboveZero, Label, Many, Number, one_of, validate

if TYPE_CHECKING:
    from scipy import sparse
    from sklearn.linear_model import Ridge

_ALPHAS = (0.3, 1.0, 3.0, 10.0, 30.0)
_CLASS_ALPHAS = (3.0, 10.0, 30.0)
_LOGISTIC = {"max_iter": 100, "tol": 1e-3}
_FOLDS = 5
_MOST_WEIGHT_BYTES = 2 << 30
_QUANTILE_ROWS = 2000  # quantile regression solves a linear program: more rows gain little and cost much
_COUNTS = 6
SixNumbers = Annotated[Many[Number], MinLen(_COUNTS), MaxLen(_COUNTS)]
SixScales = Annotated[Many[AboveZero], MinLen(_COUNTS), MaxLen(_COUNTS)]


@dataclass(frozen=True)
class Features:
    """How a prompt becomes numbers: `columns` hashed n-grams, the counts (centred and scaled), and one column for each
    model that occurred in training."""

    columns: Annotated[int, Ge(2), Le(1 << 24)]
    truncation: one_of(*TRUNCATIONS)
    max_tokens: Annotated[int, Ge(1), Le(MOST_TOKENS)]
    models: Annotated[Many[Label], MaxLen(10_000)]
    means: SixNumbers = (0.0,) * _COUNTS
    scales: SixScales = (1.0,) * _COUNTS

    def fit_scales(self, examples: Sequence[Example]) -> Features:
        counts = np.array([_counts(example) for example in examples])
        scales = np.where(counts.std(0) > 0, counts.std(0), 1.0)
        return replace(self, means=tuple(counts.mean(0).tolist()), scales=tuple(scales.tolist()))

    def counts(self, examples: Sequence[Example]) -> np.ndarray:
        return (np.array([_counts(example) for example in examples]) - self.means) / self.scales

    def matrix(self, examples: Sequence[Example]) -> sparse.csr_matrix:
        """[n, columns + counts + models]."""
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer

        hashing = HashingVectorizer(
            analyzer=self._words, n_features=self.columns, norm=None, binary=True, alternate_sign=False
        )
        known = {name: place for place, name in enumerate(self.models)}
        one_hot = sparse.lil_matrix((len(examples), len(self.models)))
        for row, example in enumerate(examples):
            if example.model in known:
                one_hot[row, known[example.model]] = 1.0
        parts = [hashing.transform(examples), sparse.csr_matrix(self.counts(examples)), one_hot.tocsr()]
        return sparse.hstack(parts, format="csr")

    def _words(self, example: Example) -> list[str]:
        """The words, and pairs of neighbouring words, of the part of the prompt that is kept."""
        words = truncate(WORD.findall(example.text.lower()), self.max_tokens, self.truncation)
        return words + [f"{one} {other}" for one, other in pairwise(words)]


def _counts(example: Example) -> list[float]:
    """Prompt length, words, the first number in the text, and marks that tell lists and code from chat."""
    text = example.text[-20_000:]
    number = re.search(r"\d{1,6}", text)
    words = len(WORD.findall(text))
    return [
        float(np.log1p(max(example.prompt_tokens, words))),
        float(np.log1p(words)),
        float(np.log1p(int(number.group()))) if number else 0.0,
        float(number is not None),
        float(np.log1p(text.count("?"))),
        float(np.log1p(text.count("\n"))),
    ]


class NgramModel:
    """Scores by task: regression [n, 1 + quantiles] targets, classes [n, C] logits, ordinal and pairwise [n, 1]."""

    kind = "ngrams"

    def __init__(self, features: Features, weights: dict[str, np.ndarray]):
        self.features = features
        self.weights = weights

    @classmethod
    def fit(
        cls,
        task: LengthTask,
        train: Sequence[Example],
        validation: Sequence[Example],
        features: Features,
        config: ProxyConfig,
        seed: int = 0,
    ) -> NgramModel:
        features = features.fit_scales(train)
        matrix, unseen = features.matrix(train), features.matrix(validation)
        # most columns are empty, and one that only one prompt uses says nothing about others
        used = np.flatnonzero(matrix.getnnz(axis=0) > 1)
        data = _Data(
            matrix[:, used], collect_lengths(train), unseen[:, used], collect_lengths(validation), config, seed
        )
        if task.is_classifying:
            weights = _fit_classes(task, data)
        elif task.kind == "pairwise":
            weights = _fit_pairs(data)
        else:
            weights = _fit_regression(task, data, features.counts(train))
        coefficients = np.zeros((matrix.shape[1], weights["coefficients"].shape[1]))
        coefficients[used] = weights["coefficients"]
        return cls(features, weights | {"coefficients": coefficients})

    def scores(self, examples: Sequence[Example]) -> np.ndarray:
        raw = self.features.matrix(examples) @ self.weights["coefficients"] + self.weights["intercepts"]
        if "heads" not in self.weights:
            return raw
        heads = _head_inputs(raw[:, 0], self.features.counts(examples)) @ self.weights["heads"]
        if self.weights["heads"].shape[1] == self.weights["quantiles"].shape[0]:  # mse: the ridge is the point
            return np.hstack([raw, heads])
        return heads

    def save(self, folder: Any) -> dict[str, Any]:
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in self.weights.items()}
        save_file(arrays, folder / "weights.safetensors")
        return {name: getattr(self.features, name) for name in Features.__dataclass_fields__}

    @classmethod
    def load(cls, folder: Any, described: dict[str, Any]) -> NgramModel:
        """Reads what `save` wrote. `UserError`: features out of range, or weights that do not fit them."""
        file, remedy = folder / "weights.safetensors", "give a folder that `lengths train` wrote"
        features = validate(Features, described, f"model of {folder}", remedy)
        try:
            with open_regular(file, "weights", remedy, _MOST_WEIGHT_BYTES) as stream:
                weights = load_arrays(stream.read())
        except (SafetensorError, OSError) as error:
            raise UserError(f"weights {file} cannot be read ({error}); {remedy}.") from None
        model = cls(features, weights)
        model.check(f"weights {file}", remedy)
        return model

    def check(self, where: str, remedy: str) -> None:
        """`UserError`: weights are missing, not finite, or do not have the shape of the features."""
        columns = self.features.columns + _COUNTS + len(self.features.models)
        for name, axes in {"coefficients": 2, "intercepts": 1}.items():
            array = self.weights.get(name)
            if array is None or array.ndim != axes:
                raise UserError(f"{where} lack {name} of {axes} axes; {remedy}.")
        if self.weights["coefficients"].shape != (columns, len(self.weights["intercepts"])):
            raise UserError(f"{where} do not have the {columns} rows that the features have; {remedy}.")
        for name, array in self.weights.items():
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise UserError(f"{where}: {quote(name)} holds what is no finite number; {remedy}.")


@dataclass(frozen=True)
class _Data:
    train: sparse.csr_matrix
    train_tokens: np.ndarray
    validation: sparse.csr_matrix
    validation_tokens: np.ndarray
    config: ProxyConfig
    seed: int

    def alphas(self, choices: tuple[float, ...]) -> tuple[float, ...]:
        alpha = self.config.alpha
        if alpha is not None and not alpha > 0:
            raise UserError(f"proxy.alpha is {alpha} but must be above 0, or null to choose it on validation data.")
        return choices if alpha is None else (alpha,)


def _fit_regression(task: LengthTask, data: _Data, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Ridge, then quantile regressions over what it predicts for examples it has not seen."""
    from sklearn.model_selection import KFold, cross_val_predict

    target, wanted = task.targets(data.train_tokens), task.targets(data.validation_tokens)
    tried = []
    for alpha in data.alphas(_ALPHAS):
        model = _ridge(alpha).fit(data.train, target)
        tried.append((float(np.abs(model.predict(data.validation) - wanted).mean()), alpha, model))
    _, alpha, model = min(tried, key=lambda entry: entry[:2])
    weights = {"coefficients": model.coef_[:, None], "intercepts": np.array([model.intercept_])}
    levels = list(task.quantiles) if task.kind == "regression" else []
    points = [] if task.loss == "mse" else [0.5]
    if not levels and not points:
        return weights
    folds = KFold(min(_FOLDS, len(target)), shuffle=True, random_state=data.seed)
    unseen = cross_val_predict(_ridge(alpha), data.train, target, cv=folds)
    weights["heads"] = _quantile_heads(_head_inputs(unseen, counts), target, points + levels, data.seed)
    weights["quantiles"] = np.array(levels)
    return weights


def _ridge(alpha: float) -> Ridge:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=alpha, solver="sparse_cg", tol=1e-4)


def _head_inputs(predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[n, 5]: one, the ridge's prediction and its square, prompt length, the first number."""
    return np.column_stack([np.ones(len(predicted)), predicted, predicted**2, counts[:, 0], counts[:, 2]])


def _quantile_heads(inputs: np.ndarray, target: np.ndarray, levels: list[float], seed: int) -> np.ndarray:
    """[inputs, levels]: a linear quantile regression a level."""
    from sklearn.linear_model import QuantileRegressor

    rows = np.random.default_rng(seed).permutation(len(target))[:_QUANTILE_ROWS]
    # a little regularization keeps the linear program bounded if inputs repeat each other
    fits = [QuantileRegressor(quantile=level, alpha=1e-6, fit_intercept=False) for level in levels]
    return np.column_stack([fit.fit(inputs[rows], target[rows]).coef_ for fit in fits])


def _fit_classes(task: LengthTask, data: _Data) -> dict[str, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    labels, wanted = task.labels(data.train_tokens), task.labels(data.validation_tokens)
    tried = []
    for alpha in data.alphas(_CLASS_ALPHAS):
        model = LogisticRegression(C=1 / alpha, **_LOGISTIC).fit(data.train, labels)
        tried.append((float((model.predict(data.validation) != wanted).mean()), alpha, model))
    _, _, model = min(tried, key=lambda entry: entry[:2])
    # a class missing from the training data gets a logit that never wins; for two classes there is one column
    coefficients = np.zeros((data.train.shape[1], len(task.class_tokens)))
    intercepts = np.full(len(task.class_tokens), -1e9)
    columns = model.classes_[1:] if len(model.classes_) == 2 else model.classes_
    intercepts[model.classes_] = 0.0
    coefficients[:, columns] = model.coef_.T
    intercepts[columns] = model.intercept_
    return {"coefficients": coefficients, "intercepts": intercepts}


def _fit_pairs(data: _Data) -> dict[str, np.ndarray]:
    """Learns which of two answers is longer, from random pairs of training examples."""
    from sklearn.linear_model import LogisticRegression

    from ds_llmpq.lengths.length_metrics import pairwise_accuracy

    count = len(data.train_tokens)
    left, right = np.random.default_rng(data.seed).integers(0, count, (2, 4 * count))
    differ = data.train_tokens[left] != data.train_tokens[right]
    left, right = left[differ], right[differ]
    if not len(left):
        raise UserError("All training answers are equally long; there are no pairs to learn from.")
    longer = data.train_tokens[left] > data.train_tokens[right]
    differences = data.train[left] - data.train[right]
    tried = []
    for alpha in data.alphas(_CLASS_ALPHAS):
        model = LogisticRegression(C=1 / alpha, **_LOGISTIC, fit_intercept=False).fit(differences, longer)
        score = data.validation @ model.coef_[0]
        tried.append((-pairwise_accuracy(data.validation_tokens, score), alpha, model))
    _, _, model = min(tried, key=lambda entry: entry[:2])
    return {"coefficients": model.coef_.T, "intercepts": np.zeros(1)}
