"""Decode passes launched before the host has read the last one's tokens: the same answers, nothing ended twice."""

import dataclasses
import random

import pytest
import torch
from pipeline_cases import LAYERS, VOCABULARY, Case, make_plan
from test_finish import POISON, poisoned  # noqa: F401 -- a fixture
from test_refill import joining

from ds_llmpq.engine.runner.look_ahead import LookAhead
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams

WHOLE = [(0, LAYERS)]


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    return checkpoint_of("llama")


def drawn_rows(seed, count, tokens, **processed):
    """Greedy rows and seeded ones in turns, every fifth with `processed`."""
    dice = random.Random(seed)
    rows = []
    for key in range(count):
        sampling = SamplingParams(temperature=0.9, top_p=0.9, seed=key) if key % 2 else SamplingParams()
        if processed and key % 5 == 0:
            sampling = dataclasses.replace(sampling, **processed)
        prompt = tuple(dice.choice(tokens) for _ in range(dice.randint(1, 9)))
        rows.append(Sequence(key, prompt, dice.randint(1, 10), sampling))
    return tuple(rows)


def check(ranks, *cases):
    """With and without; returns the outcomes with."""
    ahead = [dataclasses.replace(case, options=case.options | {"decode_graphs": True}) for case in cases]
    outcomes = ranks.run(*cases, *ahead)
    for case, plain, early in zip(cases, outcomes, outcomes[len(cases) :], strict=False):
        for index in range(len(case.groups)):
            assert early.tokens(index) == plain.tokens(index), case.label
            assert early.finish(index) == plain.finish(index), case.label
        assert plain.ranks[0]["report"]["passes_ahead"] == 0
    return outcomes[len(cases) :]


def test_refilled_rows_seeded_rows_and_rows_that_end_early(ranks, llama):
    """Ends that nobody could foresee: a token, and each row's third; one decode group, and two in turns."""
    rows = drawn_rows(1, 14, range(VOCABULARY))
    groups = joining(rows, 5, 4, 20)
    plans = [make_plan(llama, WHOLE, micro_batch=(2, size), workload=(4, 10, 10)) for size in (4, 2)]
    cases = [
        Case(llama, plans[0], groups, eos=(7, 50), label="one decode group"),
        Case(llama, plans[1], groups, eos=(7, 50), every=3, label="two decode groups"),
    ]
    one, two = (outcome.ranks[0]["report"] for outcome in check(ranks, *cases))
    # all but the first, and but those that were launched for rows that had all ended
    assert one["passes_ahead"] > 0.9 * one["passes"]["decode"]
    assert two["passes_ahead"] > 0


def test_a_row_that_asks_for_its_tokens_on_the_host_is_waited_for(ranks, llama):
    rows = drawn_rows(2, 8, range(VOCABULARY), repetition_penalty=1.3)
    case = Case(llama, make_plan(llama, WHOLE, micro_batch=(2, 4), workload=(4, 10, 10)), joining(rows, 8, 4, 20))
    [outcome] = check(ranks, case)
    report = outcome.ranks[0]["report"]
    assert 0 < report["passes_ahead"] < report["passes"]["decode"]


def test_rows_without_logits_and_rows_that_outgrow_their_slots(ranks, poisoned):  # noqa: F811
    sound = [token for token in range(VOCABULARY) if token != POISON]
    rows = list(drawn_rows(3, 8, sound))
    rows[2] = dataclasses.replace(rows[2], prompt=(4, POISON))
    path = poisoned["llama"]
    case = Case(path, make_plan(path, WHOLE, micro_batch=(2, 4), workload=(8, 12, 12)), joining(tuple(rows), 8, 4, 11))
    [outcome] = check(ranks, case)
    assert outcome.ranks[0]["report"]["passes_ahead"] > 0


def test_pipelines_of_more_stages_have_none(ranks, llama):
    rows = drawn_rows(4, 3, range(VOCABULARY))
    case = Case(llama, make_plan(llama, [(0, 2), (2, LAYERS)], workload=(4, 10, 10)), joining(rows, 3, 4, 20))
    [outcome] = check(ranks, case)
    assert all(rank["report"]["passes_ahead"] == 0 for rank in outcome.ranks)


def test_a_launch_that_fails_is_said_once(capsys):
    ahead = LookAhead(None, None, None, None, torch.device("cpu"))
    for _ in range(3):
        ahead.note_failure(RuntimeError("no such kernel"))
    assert capsys.readouterr().err == (
        "ds-llmpq: a decode pass ahead of the host failed (no such kernel); it runs in its turn\n"
    )
