"""Damaged and hostile inputs: of each comes a result or one sentence, and no file, program or connection elsewhere.

The same loaders, longer: `python scripts/fuzz.py`.
"""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaders import Guard, all_loaders, try_input

NAMES = [
    "batch", "plan", "assignment", "problem", "omega", "hostfile", "profile", "links", "cluster", "overrides",
    "config.json", "checkpoint", "index", "safetensors", "quantized", "tokenizer", "journal", "results", "job",
    "predictor", "lengths",
]  # fmt: skip
SLOW = {"cluster": 5, "overrides": 12, "tokenizer": 12}  # inputs; the others are read in under a millisecond
INPUTS = 80


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

    @settings(max_examples=SLOW.get(name, INPUTS), suppress_health_check=list(HealthCheck))
    @given(rng=st.randoms(use_true_random=False))
    def check(rng):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = loader.mutate(rng, loader.seed)
            with guard:
                try_input(loader, data, tmp_path / "input")

    guard.found.clear()
    check()
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
