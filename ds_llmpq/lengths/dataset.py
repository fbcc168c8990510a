"""Examples split into training, validation and test data, and the files that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import read_json, read_json_lines, write_json
from ds_llmpq.lengths.config import LengthDataConfig
from ds_llmpq.lengths.records import Example
from ds_llmpq.validation import Plain, validate

SPLITS = ("train", "validation", "test")
TRUNCATIONS = ("tail", "head_tail")
RECORDS_NAME, DATASET_NAME = "records.jsonl", "dataset.json"
_FEWEST = 10


@dataclass(frozen=True)
class Dataset:
    """The examples of each split. No conversation is in two splits."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.train + self.validation + self.test

    @property
    def models(self) -> tuple[str, ...]:
        """Models seen in training, by name."""
        return tuple(sorted({example.model for example in self.train}))


def collect_lengths(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example.output_tokens for example in examples], dtype=float)


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of texts, models and lengths, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.text, example.model, example.output_tokens]).encode() + b"\n")
    return digest.hexdigest()


def select_examples(examples: Sequence[Example], config: LengthDataConfig) -> list[Example]:
    """The examples of `config.model`, if it is set; at most `config.limit`, drawn with the seed."""
    if config.model is not None:
        known = sorted({example.model for example in examples})
        examples = [example for example in examples if example.model == config.model]
        if not examples:
            raise UserError(f"lengths.model is {config.model!r}, but the data has {', '.join(known[:30])}.")
    if config.limit is not None and config.limit < len(examples):
        if config.limit < 1:
            raise UserError(f"lengths.limit is {config.limit} but must be at least 1.")
        keep = np.random.default_rng(config.seed).permutation(len(examples))[: config.limit]
        examples = [examples[place] for place in np.sort(keep)]
    return list(examples)


def split(examples: Sequence[Example], config: LengthDataConfig) -> Dataset:
    """Draws whole conversations for test and validation; the rest is for training."""
    test, validation = config.test_share, config.validation_share
    if not (test > 0 and validation > 0 and test + validation < 1):
        raise UserError(
            f"lengths.test_share is {test} and lengths.validation_share is {validation}, but both must be above 0 and "
            "leave something to train on."
        )
    names = sorted({example.conversation for example in examples})
    if len(names) < _FEWEST:
        raise UserError(f"There are {len(names)} conversations, but at least {_FEWEST} are needed to train and test.")
    order = np.random.default_rng(config.seed).permutation(len(names))
    tests, validations = (max(1, round(len(names) * share)) for share in (test, validation))
    place = {names[index]: rank for rank, index in enumerate(order.tolist())}
    parts: list[list[Example]] = [[], [], []]
    for example in examples:
        rank = place[example.conversation]
        parts[2 if rank < tests else 1 if rank < tests + validations else 0].append(example)
    return Dataset(*map(tuple, parts))


def write(folder: Path, dataset: Dataset, config: LengthDataConfig) -> None:
    """Writes records.jsonl (one example a line, with its split) and dataset.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RECORDS_NAME, "w", encoding="utf-8") as stream:
        for name in SPLITS:
            for example in getattr(dataset, name):
                stream.write(json.dumps(asdict(example) | {"split": name}, ensure_ascii=False) + "\n")
    described = {
        "schema": 1,
        "settings": asdict(config),
        "fingerprint": fingerprint(dataset.train),
        "examples": {name: len(getattr(dataset, name)) for name in SPLITS},
        "cut": sum(example.cut for example in dataset.examples),
        "models": list(dataset.models),
    }
    write_json(folder / DATASET_NAME, described)


def read(folder: Path) -> Dataset:
    """Reads a folder that `write` made. `UserError`: another folder, or its records were changed."""
    parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
    file, what, remedy = folder / RECORDS_NAME, "length data", "prepare it again"
    described = validate(Plain, read_json(folder / DATASET_NAME, what, remedy), f"{what} {folder}", remedy)
    for number, row in read_json_lines(file, what, remedy):
        where = f"{what} {file} line {number}"
        named = isinstance(row, dict) and row.pop("split", None)
        if not isinstance(named, str) or named not in parts:
            raise UserError(f"{where}: split is {quote(named)}, but must be one of {', '.join(SPLITS)}; {remedy}.")
        parts[named].append(validate(Example, row, where, remedy))
    dataset = Dataset(*(tuple(parts[name]) for name in SPLITS))
    if described.get("fingerprint") != fingerprint(dataset.train):
        raise UserError(f"{folder / RECORDS_NAME} was changed since it was prepared; prepare it again.")
    return dataset


def truncate(words: list, max_tokens: int, truncation: str) -> list:
    """The last `max_tokens` of a prompt (`tail`), or a quarter of them from its start and the rest from its end
    (`head_tail`)."""
    if truncation not in TRUNCATIONS:
        raise UserError(f"lengths.truncation is {truncation!r} but must be tail or head_tail.")
    if max_tokens < 1:
        raise UserError(f"lengths.max_tokens is {max_tokens} but must be at least 1.")
    if len(words) <= max_tokens:
        return words
    head = max_tokens // 4 if truncation == "head_tail" else 0
    return words[:head] + words[len(words) - (max_tokens - head) :]


def hide_lengths(examples: Sequence[Example]) -> list[Example]:
    """The examples without their lengths: what a predictor may see."""
    return [replace(example, output_tokens=None) for example in examples]
