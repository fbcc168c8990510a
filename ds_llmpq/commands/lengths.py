"""`lengths`: prepare data, train, evaluate and use a length predictor, or show how lengths are distributed."""

from __future__ import annotations

import math
from pathlib import Path

from ds_llmpq.errors import UserError
from ds_llmpq.files import write_json
from ds_llmpq.lengths import actions, dataset
from ds_llmpq.lengths.characterize import describe_distribution, group_lengths
from ds_llmpq.lengths.config import LengthsConfig
from ds_llmpq.lengths.predictor import evaluate, train
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.research.schedule_plots import plot_lengths
from ds_llmpq.wording import format_number, pluralize

_COLUMNS = ("answers", "mean", "p50", "p90", "p95", "p99", "max", "tail_ratio", "longest_of_8", "longest_of_32")


def run(settings: LengthsConfig, out: Path) -> int:
    if settings.action not in _ACTIONS:
        raise UserError(f"action is {settings.action!r} but must be one of {', '.join(_ACTIONS)}.")
    _ACTIONS[settings.action](settings, out)
    return 0


def _prepare(settings: LengthsConfig, out: Path) -> None:
    data = actions.load_dataset(settings)
    dataset.write(out, data, settings.lengths)
    print(format_table(["split", "examples"], [[name, str(len(getattr(data, name)))] for name in dataset.SPLITS]))
    print(f"prepared: {out / dataset.RECORDS_NAME}")


def _train(settings: LengthsConfig, out: Path) -> None:
    data = actions.load_dataset(settings)
    predictor = train(data, settings.task, settings.proxy, settings.lengths, out)
    predictor.save(out)
    found = evaluate(predictor, data.test)
    _report(found, out)
    if found.get("mae_tokens", 0) > found.get("mae_of_constant_tokens", math.inf):
        print("note: on the test split the same length for every answer is closer; only the bounds are of use")
    print(f"predictor: {out / 'predictor.json'}")


def _evaluate(settings: LengthsConfig, out: Path) -> None:
    predictor = actions.load_chosen_predictor(settings)
    examples, trained_on = actions.select_unseen(settings, predictor)
    count = pluralize(len(examples), "example")
    print(f"test split: {count}" if trained_on else f"not the training data: all {count}")
    _report(evaluate(predictor, examples), out)


def _predict(settings: LengthsConfig, out: Path) -> None:
    file = out / "predictions.jsonl"
    count = actions.write_predictions(settings, actions.load_chosen_predictor(settings), file)
    print(f"{pluralize(count, 'prediction')}: {file}")


def _characterize(settings: LengthsConfig, out: Path) -> None:
    by_model = group_lengths(actions.load_answers(settings))
    found = {name: describe_distribution(tokens) for name, tokens in by_model.items()}
    write_json(out / "lengths.json", found)
    plots = plot_lengths(out, by_model)
    rows = [[name, *(format_number(row[column], 4) for column in _COLUMNS)] for name, row in found.items()]
    print(format_table(["model", *(column.replace("_", " ") for column in _COLUMNS)], rows))
    print(f"lengths: {', '.join(str(out / name) for name in ('lengths.json', *plots))}")


def _report(metrics: dict[str, float], out: Path) -> None:
    write_json(out / "metrics.json", {"schema": 1} | metrics)
    print(format_table(["metric", "value"], [[name, format_number(value, 4)] for name, value in metrics.items()]))
    print(f"metrics: {out / 'metrics.json'}")


_ACTIONS = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "characterize": _characterize,
}
