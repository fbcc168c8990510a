"""The pipeline against transformers in one process: greedy tokens must be the same, whatever the cut."""

import pytest
from pipeline_cases import VARIANTS, Case, Draw, Outcome

from ds_llmpq.engine.sequences import Finish


def check(case: Case, expected: list[list[int]], outcome: Outcome) -> None:
    rows = [row for wave in case.waves for row in wave.rows]
    found = [tokens for index in range(len(case.waves)) for tokens in outcome.tokens(index)]
    finish = [code for index in range(len(case.waves)) for code in outcome.finish(index)]
    for row, tokens, code, wanted in zip(rows, found, finish, expected, strict=True):
        assert tokens == wanted, f"{case.label}, row {row.key}"
        stopped = wanted[-1] in case.eos and not row.ignore_eos
        assert code is (Finish.STOP if stopped else Finish.LENGTH), f"{case.label}, row {row.key}"


def run_and_check(ranks, drawn: list[tuple[Case, list[list[int]]]]) -> None:
    outcomes = ranks.run(*(case for case, _ in drawn))
    for (case, expected), outcome in zip(drawn, outcomes, strict=True):
        check(case, expected, outcome)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_architecture_is_token_identical(ranks, checkpoint_of, stages):
    drawn = [
        Draw(seed=100 * stages + index).case(checkpoint_of(variant), stages) for index, variant in enumerate(VARIANTS)
    ]
    run_and_check(ranks, drawn)


@pytest.mark.parametrize("stages", [1, 2])
def test_mixed_bits_are_identical_to_the_same_hqq_layers(ranks, checkpoint_of, stages):
    drawn = []
    for index, variant in enumerate(("llama", "mistral-window", "qwen3", "opt-projected-post-norm", "bloom")):
        draw = Draw(seed=500 + 10 * stages + index)
        drawn.append(draw.case(checkpoint_of(variant), stages, draw.bits()))
    run_and_check(ranks, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_random_sweep(ranks, checkpoint_of, stages):
    """Every variant, at 16 bits and with mixed bits, many cuts, micro-batches and rank orders."""
    drawn = []
    for variant_index, variant in enumerate(VARIANTS):
        for repeat in range(3):
            draw = Draw(seed=10_000 * stages + 100 * variant_index + repeat)
            drawn.append(draw.case(checkpoint_of(variant), stages, draw.bits() if repeat % 2 else ()))
    run_and_check(ranks, drawn)
