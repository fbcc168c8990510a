"""Masks against their definition, token by token; where the head is applied."""

import itertools

import pytest
import torch

from ds_llmpq.models.step import Step


def step_of(positions, kv_tokens, causal_only, **fields):
    return Step(torch.tensor(positions), None, kv_tokens, causal_only, **fields)


def allowed(query, key, window):
    return key <= query and (window is None or query - key < window)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 7, 50])
def test_prefill(window):
    """Seven tokens: without an explicit mask exactly where causality says the same."""
    mask = step_of([list(range(7))] * 2, 7, True).mask(window)
    wanted = [[allowed(query, key, window) for key in range(7)] for query in range(7)]
    if window is None or window >= 7:
        assert mask is None
    else:
        assert mask.shape == (2, 1, 7, 7)
        assert mask[0, 0].tolist() == mask[1, 0].tolist() == wanted


@pytest.mark.parametrize("window", [None, 1, 4, 9, 10])
@pytest.mark.parametrize("positions", [[8], [8, 8, 8], [2, 8, 0]])
def test_decode(window, positions):
    """One token a row, each at its own place; nine cached positions."""
    level = min(positions) == 8
    mask = step_of([[position] for position in positions], 9, level).mask(window)
    if level and (window is None or window >= 9):
        assert mask is None
        return
    assert mask.shape == (len(positions), 1, 1, 9)
    for row, position in enumerate(positions):
        assert mask[row, 0, 0].tolist() == [allowed(position, key, window) for key in range(9)]


def test_every_query_sees_itself():
    """Also padded ones: a row of a softmax without any key would be NaN."""
    for window, causal in itertools.product((None, 1, 2), (True, False)):
        mask = step_of([list(range(5))], 5, causal).mask(window)
        assert mask is None or mask[0, 0].diagonal().all()


def test_head_at_the_last_real_token():
    hidden = torch.randn(3, 4, 5)
    step = step_of([list(range(4))] * 3, 4, True, hidden=hidden, last=torch.tensor([0, 3, 1]))
    assert torch.equal(step.at_last(), torch.stack([hidden[0, 0], hidden[1, 3], hidden[2, 1]]))
    step.last = None
    assert step.at_last() is hidden


def test_position_inputs_are_computed_once():
    calls = []

    def prepare(step):
        calls.append(step)
        step.position_inputs["angle"] = 5

    step = step_of([[0]], 1, True, prepare=prepare)
    assert step.prepare_inputs() == step.prepare_inputs() == {"angle": 5}
    assert len(calls) == 1
