"""What the actions of `ds-llmpq lengths` read and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.files import make_absolute
from ds_llmpq.lengths import dataset
from ds_llmpq.lengths.config import LengthsConfig
from ds_llmpq.lengths.predictor import Predictor, load_predictor
from ds_llmpq.lengths.records import Example, make_counter, read_batch_examples, read_examples


def load_dataset(settings: LengthsConfig) -> dataset.Dataset:
    """The splits in a folder that `prepare` wrote, or of a file of answers, split now. `UserError`: too few
    examples."""
    path = _resolve(settings.data, "data")
    if (path / dataset.DATASET_NAME).is_file():
        return dataset.read(path)
    return dataset.split(load_answers(settings), settings.lengths)


def load_chosen_predictor(settings: LengthsConfig) -> Predictor:
    return load_predictor(_resolve(settings.predictor, "predictor"))


def load_answers(settings: LengthsConfig) -> list[Example]:
    """All answers of a prepared folder, or those of a file that the settings select."""
    path = _resolve(settings.data, "data")
    if (path / dataset.DATASET_NAME).is_file():
        return list(dataset.read(path).examples)
    return dataset.select_examples(_read_examples(settings, path), settings.lengths)


def select_unseen(settings: LengthsConfig, predictor: Predictor) -> tuple[list[Example], bool]:
    """The test split if the predictor was trained on this data (True), else all examples (False)."""
    path = _resolve(settings.data, "data")
    try:
        data = load_dataset(settings)
    except UserError:
        if path.is_dir():
            raise
        return _read_examples(settings, path), False  # too few to split, but enough to evaluate on
    trained_on = dataset.fingerprint(data.train) == predictor.about["fingerprint"]
    return list(data.test if trained_on else data.examples), trained_on


def write_predictions(settings: LengthsConfig, predictor: Predictor, file: Path) -> int:
    """Predicts the answers to `settings.input`, one JSON line each. Returns their number."""
    named = _read_prompts(settings)
    found = predictor.predict([example for _, example in named])
    with open(file, "w", encoding="utf-8") as stream:
        for place, (name, example) in enumerate(named):
            row: dict[str, Any] = {"custom_id": name, "predicted_tokens": round(float(found.tokens[place]), 2)}
            row |= {level: round(float(bound[place]), 2) for level, bound in found.bounds.items()}
            if found.classes is not None:
                row["predicted_class"] = int(found.classes[place])
            row |= {"prompt_tokens": example.prompt_tokens, "output_tokens": example.output_tokens}
            stream.write(json.dumps(row) + "\n")
    return len(named)


def _read_prompts(settings: LengthsConfig) -> list[tuple[str, Example]]:
    """Prompts by custom_id (an OpenAI batch file) or by row number."""
    path, counter = _resolve(settings.input, "input"), make_counter(settings.lengths.tokenizer)
    named = read_batch_examples(path, counter) if path.suffix == ".jsonl" else []
    if named:
        return named
    return [(str(number), example) for number, example in enumerate(_read_examples(settings, path, answered=False))]


def _read_examples(settings: LengthsConfig, path: Path, answered: bool = True) -> list[Example]:
    options = settings.lengths
    batch_input = make_absolute(options.input) if options.input else None
    counter = make_counter(options.tokenizer)
    return read_examples(path, options.layout, options.rounds, batch_input, counter, answered)


def _resolve(value: str | None, name: str) -> Path:
    if value is None:
        raise UserError(f"Nothing is known of {name}; give {name}=FILE or {name}=DIR.")
    return make_absolute(value)
