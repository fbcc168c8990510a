"""`lengths`: prepare data, train, evaluate and use a predictor of output lengths, or show how lengths are spread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.commands.config import LengthsConfig
from ds_llmpq.errors import UserError
from ds_llmpq.lengths import dataset
from ds_llmpq.lengths.characterize import distribution, group_lengths
from ds_llmpq.lengths.predictor import Predictor, evaluate, load_predictor, train
from ds_llmpq.lengths.records import Example, make_counter, read_batch_examples, read_examples
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.research.schedule_plots import plot_lengths

_COLUMNS = ("answers", "mean", "p50", "p90", "p95", "p99", "max", "tail_ratio", "longest_of_8", "longest_of_32")


def run(settings: LengthsConfig, out: Path) -> int:
    if settings.action not in _ACTIONS:
        raise UserError(f"action is {settings.action!r} but must be one of {', '.join(_ACTIONS)}.")
    _ACTIONS[settings.action](settings, out)
    return 0


def _prepare(settings: LengthsConfig, out: Path) -> None:
    data = _dataset(settings)
    dataset.write(out, data, settings.lengths)
    print(format_table(["split", "examples"], [[name, str(len(getattr(data, name)))] for name in dataset.SPLITS]))
    print(f"prepared: {out / dataset.RECORDS_NAME}")


def _train(settings: LengthsConfig, out: Path) -> None:
    data = _dataset(settings)
    predictor = train(data, settings.task, settings.proxy, settings.lengths, out)
    predictor.save(out)
    _report(evaluate(predictor, data.test), out)
    print(f"predictor: {out / 'predictor.json'}")


def _evaluate(settings: LengthsConfig, out: Path) -> None:
    predictor = load_predictor(_given(settings.predictor, "predictor"))
    _report(evaluate(predictor, _unseen(settings, predictor)), out)


def _predict(settings: LengthsConfig, out: Path) -> None:
    predictor = load_predictor(_given(settings.predictor, "predictor"))
    named = _prompts(_given(settings.input, "input"), settings)
    found = predictor.predict([example for _, example in named])
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as stream:
        for place, (name, example) in enumerate(named):
            row: dict[str, Any] = {"custom_id": name, "predicted_tokens": round(float(found.tokens[place]), 2)}
            row |= {level: round(float(bound[place]), 2) for level, bound in found.bounds.items()}
            if found.classes is not None:
                row["predicted_class"] = int(found.classes[place])
            row |= {"prompt_tokens": example.prompt_tokens, "output_tokens": example.output_tokens}
            stream.write(json.dumps(row) + "\n")
    print(f"{len(named)} predictions: {out / 'predictions.jsonl'}")


def _characterize(settings: LengthsConfig, out: Path) -> None:
    path = _given(settings.data, "data")
    if (path / dataset.DATASET_NAME).is_file():
        examples = list(dataset.read(path).examples)
    else:
        examples = dataset.select_examples(_examples(settings, path), settings.lengths)
    by_model = group_lengths(examples)
    found = {name: distribution(tokens) for name, tokens in by_model.items()}
    (out / "lengths.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plots = plot_lengths(out, by_model)
    rows = [[name, *(f"{row[column]:.4g}" for column in _COLUMNS)] for name, row in found.items()]
    print(format_table(["model", *(column.replace("_", " ") for column in _COLUMNS)], rows))
    print(f"lengths: {', '.join(str(out / name) for name in ('lengths.json', *plots))}")


_ACTIONS: dict[str, Callable[[LengthsConfig, Path], None]] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "characterize": _characterize,
}


def _given(value: str | None, name: str) -> Path:
    if value is None:
        raise UserError(f"Nothing is known of {name}; give {name}=FILE or {name}=DIR.")
    return config.make_absolute(value)


def _dataset(settings: LengthsConfig) -> dataset.Dataset:
    return dataset.load(_given(settings.data, "data"), settings.lengths)


def _examples(settings: LengthsConfig, path: Path, answered: bool = True) -> list[Example]:
    options = settings.lengths
    batch_input = config.make_absolute(options.input) if options.input else None
    counter = make_counter(options.tokenizer)
    return read_examples(path, options.layout, options.rounds, batch_input, counter, answered)


def _unseen(settings: LengthsConfig, predictor: Predictor) -> list[Example]:
    """The test split of the data the predictor was trained on, or all of other data."""
    path = _given(settings.data, "data")
    try:
        data = _dataset(settings)
    except UserError:
        if path.is_dir():
            raise
        data = None  # too few to split, but enough to measure on
    if data is not None and dataset.fingerprint(data.train) == predictor.about["fingerprint"]:
        print(f"test split: {len(data.test)} examples")
        return list(data.test)
    examples = list(data.examples) if data is not None else _examples(settings, path)
    print(f"not the training data: all {len(examples)} examples")
    return examples


def _prompts(path: Path, settings: LengthsConfig) -> list[tuple[str, Example]]:
    """Prompts by custom_id (an OpenAI batch file) or by row number."""
    counter = make_counter(settings.lengths.tokenizer)
    named = read_batch_examples(path, counter) if path.suffix == ".jsonl" else []
    if named:
        return named
    return [(str(number), example) for number, example in enumerate(_examples(settings, path, answered=False))]


def _report(metrics: dict[str, float], out: Path) -> None:
    (out / "metrics.json").write_text(json.dumps({"schema": 1} | metrics, indent=1) + "\n", encoding="utf-8")
    print(format_table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()]))
    print(f"metrics: {out / 'metrics.json'}")
