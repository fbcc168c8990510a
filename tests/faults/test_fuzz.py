"""Damaged and hostile inputs: of each comes a result or one sentence, and no file, program or connection elsewhere.

The same loaders, longer: `python scripts/fuzz.py`.
"""

import hashlib
import random
import warnings
from itertools import islice

import pytest
from loaders import Guard, all_loaders, try_input

NAMES = [
    "batch", "plan", "assignment", "problem", "sensitivity", "hostfile", "profile", "links", "cluster", "overrides",
    "config.json", "checkpoint", "index", "safetensors", "quantized", "tokenizer", "journal", "results", "job",
    "predictor", "lengths", "latency", "manifest", "metrics", "scores", "spans", "failure", "arrivals", "answers",
    "cases", "dataset", "gpus", "pins", "answers.csv", "generation", "score job", "errors", "in flight",
    "progress lines", "failure lines", "kept rows", "kept states", "training state", "swept", "point", "shown answers",
]  # fmt: skip
SLOW = {
    "cluster": 5,
    "overrides": 12,
    "tokenizer": 12,
    "predictor": 12,
}  # inputs; the others are read in under a millisecond
INPUTS = 60
PLACES = 40  # of all places and odd values, drawn anew with each version of the valid file


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    return all_loaders(tmp_path_factory.mktemp("valid"))


@pytest.fixture(scope="module")
def guard():
    return Guard()


def test_every_loader_is_here(loaders):
    assert sorted(loaders) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_only_a_result_or_a_sentence(name, loaders, guard, tmp_path):
    loader = loaders[name]
    if loader.seed:  # and what is imported on first use is no finding
        assert try_input(loader, loader.seed, tmp_path / "input") == "ok"
    guard.allowed = [str(tmp_path.resolve())]

    guard.found.clear()
    for number in range(SLOW.get(name, INPUTS)):
        rng = random.Random(f"{name} {number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = loader.mutate(rng, loader.seed)
            with guard:
                try_input(loader, data, tmp_path / "input")
    assert not guard.found


@pytest.mark.parametrize("name", NAMES)
def test_every_place_with_odd_values(name, loaders, guard, tmp_path):
    """A sample; `scripts/fuzz.py` tries all of them."""
    loader = loaders[name]
    inputs = list(islice(loader.all_inputs(), 20_000))
    most = min(SLOW.get(name, PLACES), len(inputs))
    guard.allowed = [str(tmp_path.resolve())]
    guard.found.clear()
    for data in random.Random(hashlib.sha256(loader.seed).hexdigest()).sample(inputs, most):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with guard:
                try_input(loader, data, tmp_path / "input")
    assert not guard.found


def test_the_guard_sees_what_it_should(guard, tmp_path):
    """The tests above could not fail without it."""
    guard.found.clear()
    guard.allowed = [str((tmp_path / "in").resolve())]
    (tmp_path / "in").mkdir()
    with guard:
        (tmp_path / "in" / "file").write_text("x")
    assert not guard.found
    with guard:
        (tmp_path / "out").write_text("x")
        (tmp_path / "out").rename(tmp_path / "other")
        (tmp_path / "folder").mkdir()
    assert len(guard.found) == 3
