"""A kept training is put back whole or not at all."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ds_llmpq.lengths.training_state import FILE_NAME, TrainingState


def training(folder):
    head = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(head.parameters())
    return TrainingState(folder, {"a": 1}), {"head": head}, optimizer, np.random.default_rng(0)


@pytest.fixture
def file(tmp_path):
    state, modules, optimizer, generator = training(tmp_path)
    modules["head"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    generator.random()
    state.keep(3, modules, optimizer, generator)
    return tmp_path / FILE_NAME


def test_what_fits_is_put_back(file):
    state, modules, optimizer, generator = training(file.parent)
    assert state.resume(modules, optimizer, generator) == 3
    expected = np.random.default_rng(0)
    expected.random()
    assert generator.random() == expected.random()
    assert all("exp_avg" in entry for entry in optimizer.state.values())


@pytest.mark.parametrize(
    ("tensors", "generator"),
    [
        ({}, {"state": {"state": 1, "inc": 2**200}}), ({}, {"state": {"state": -1, "inc": 1}}),
        ({}, {"bit_generator": "MT19937"}), ({"head/bias": None}, {}), ({"head/bias": torch.zeros(3)}, {}),
        ({"more/bias": torch.zeros(1)}, {}), ({"optimizer/0/exp_avg": torch.zeros(7)}, {}),
        ({"optimizer/0/exp_avg": None}, {}), ({"optimizer/9/step": torch.zeros(())}, {}),
        ({"random": torch.zeros(3)}, {}),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(file, tensors, generator):
    with safe_open(file, framework="pt") as kept:
        found = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        about = json.loads(kept.metadata()["about"])
    about["generator"] |= generator
    found = {name: tensor for name, tensor in (found | tensors).items() if tensor is not None}
    save_file(found, file, {"about": json.dumps(about)})
    state, modules, optimizer, random = training(file.parent)
    before = {name: value.clone() for name, value in modules["head"].state_dict().items()}
    assert state.resume(modules, optimizer, random) == 0
    assert all(value.equal(before[name]) for name, value in modules["head"].state_dict().items())
    assert not optimizer.state
    assert random.random() == np.random.default_rng(0).random()
