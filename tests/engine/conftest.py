"""The process that forks ranks, shared by all tests of the engine; small checkpoints, made once each."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline_cases import VARIANTS, Ranks


@pytest.fixture(scope="session")
def ranks():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices; more threads only get into each other's way
    host = Ranks()
    yield host
    host.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """checkpoint_of(variant): folder of a small random checkpoint."""
    from scripts.make_checkpoint import make_checkpoint

    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_checkpoint(
                tmp_path_factory.mktemp(variant), tokenizer=None, seed=len(variant), **VARIANTS[variant]
            )
        return made[variant]

    return get
