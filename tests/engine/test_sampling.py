"""Sampling against a slow reference, its edges, and what it must not depend on."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from ds_llmpq.engine import token_chooser
from ds_llmpq.engine.runner.capture import capture_trace
from ds_llmpq.engine.sampling import NO_DEFAULTS, choose_greedily, draw_uniform, sample
from ds_llmpq.models.generation import Generation
from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams


def allowed_probabilities(logits: list[float], row: SamplingParams) -> dict[int, float]:
    """Token -> probability, by the definitions: softmax at the temperature, the top_k best, the fewest best that
    together reach top_p."""
    top = max(logits)
    weights = {token: math.exp((value - top) / row.temperature) for token, value in enumerate(logits)}
    best = sorted(weights, key=lambda token: (-weights[token], token))[: row.top_k or len(logits)]
    mass = sum(weights[token] for token in best)
    kept, reached = {}, 0.0
    for token in best:
        if kept and reached >= row.top_p * mass:
            break
        kept[token] = weights[token]
        reached += weights[token]
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items()}


def inverse_distribution(logits: list[float], row: SamplingParams, step: int) -> int:
    """The token whose part of the cumulative distribution, best token first, holds the draw."""
    draw, reached = draw_uniform(row.seed, step), 0.0
    probabilities = allowed_probabilities(logits, row)
    for token, probability in probabilities.items():
        reached += probability
        if draw < reached:
            return token
    return list(probabilities)[-1]


def random_row(generator: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=generator.choice((0.2, 0.7, 1.0, 1.9)),
        top_p=generator.choice((1.0, 0.95, 0.5, 0.05)),
        top_k=generator.choice((0, 1, 3, 20, 10_000)),
        seed=generator.randrange(-5, 2**63),
    )


def test_greedy_is_argmax():
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [GREEDY] * 50, [0] * 50).tolist() == logits.argmax(-1).tolist()


def test_every_draw_is_the_reference_s():
    generator = random.Random(1)
    logits = torch.randn(600, 61, generator=torch.Generator().manual_seed(1)) * 3
    rows = [random_row(generator) for _ in range(600)]
    steps = [generator.randrange(1000) for _ in rows]
    found = sample(logits, rows, steps).tolist()
    wanted = [
        inverse_distribution(values, row, step) for values, row, step in zip(logits.tolist(), rows, steps, strict=True)
    ]
    assert found == wanted
    assert len(set(found)) > 20


@pytest.mark.parametrize(
    "row",
    [
        SamplingParams(1.0),
        SamplingParams(0.5, top_k=4),
        SamplingParams(1.5, top_p=0.7),
        SamplingParams(0.8, top_p=0.9, top_k=5),
    ],
)
def test_frequencies_are_the_distribution_s(row):
    """Pearson's chi-square over 20,000 seeds, under a bound that a true sampler passes but once in 10,000."""
    logits = [2.0, 1.0, 0.5, 0.0, -0.3, 1.7, 0.9, -1.0]
    draws = 20_000
    rows = [dataclasses.replace(row, seed=seed) for seed in range(draws)]
    counts = np.bincount(sample(torch.tensor([logits] * draws), rows, [3] * draws), minlength=len(logits))
    expected = allowed_probabilities(logits, row)
    assert set(np.flatnonzero(counts)) == set(expected)
    statistic = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items())
    assert statistic < 29.9  # 7 degrees of freedom at most


def test_draws_of_one_seed_are_independent_uniforms():
    draws = np.array([[draw_uniform(seed, step) for step in range(200)] for seed in range(100)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert len(np.unique(draws)) == draws.size
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.03


def test_a_row_depends_on_itself_alone():
    """Neither on its neighbours nor on its place among them."""
    generator = random.Random(2)
    logits = torch.randn(40, 97, generator=torch.Generator().manual_seed(2)) * 2
    rows = [random_row(generator) if index % 3 else GREEDY for index in range(40)]
    steps = [generator.randrange(50) for _ in rows]
    together = sample(logits, rows, steps).tolist()
    order = generator.sample(range(40), 40)
    shuffled = sample(logits[order], [rows[i] for i in order], [steps[i] for i in order]).tolist()
    assert shuffled == [together[i] for i in order]
    assert [int(sample(logits[i : i + 1], rows[i : i + 1], steps[i : i + 1])) for i in range(40)] == together


def test_seed_and_step_matter():
    logits = torch.zeros(30, 1000)
    by_seed = sample(logits, [SamplingParams(1.0, seed=seed) for seed in range(30)], [0] * 30)
    by_step = sample(logits, [SamplingParams(1.0, seed=7)] * 30, list(range(30)))
    assert len(set(by_seed.tolist())) > 25
    assert len(set(by_step.tolist())) > 25


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-38, 1e-46, 1e-300, 5e-324])
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(3)) * 10
    logits[0] *= 5e36  # near the largest float32 numbers
    rows = [SamplingParams(temperature, top_p=0.9 if index % 2 else 1.0, seed=index) for index in range(20)]
    found = sample(logits, rows, [0] * 20)
    assert logits.gather(1, found[:, None])[:, 0].tolist() == logits.amax(1).tolist()


@pytest.mark.parametrize(
    "row", [SamplingParams(2.0, top_p=0.0), SamplingParams(2.0, top_k=1), SamplingParams(9.0, top_p=1e-9)]
)
def test_the_narrowest_choice_is_the_best_token(row):
    logits = torch.randn(64, 33, generator=torch.Generator().manual_seed(4))
    rows = [dataclasses.replace(row, seed=seed) for seed in range(64)]
    assert sample(logits, rows, [5] * 64).tolist() == logits.argmax(-1).tolist()


def test_ties_share_the_mass_that_top_p_leaves():
    rows = [SamplingParams(1.0, top_p=0.5, seed=seed) for seed in range(500)]
    assert set(sample(torch.zeros(500, 8), rows, [0] * 500).tolist()) == {0, 1, 2, 3}


def test_top_p_of_one_keeps_the_whole_tail():
    """100,000 tokens, of which all but the first have together 1e-5 of the mass: they still come up."""
    count = 100_000
    logits = torch.full((1, count), math.log(1e-5 / count))
    logits[0, 0] = 0.0
    seed = next(seed for seed in range(10**7) if draw_uniform(seed, 0) > 1 - 0.5e-5)
    assert int(sample(logits, [SamplingParams(1.0, top_p=1.0, seed=seed)], [0])) > 0


def test_broken_logits_still_give_tokens_of_the_vocabulary():
    logits = torch.zeros(3, 10)
    logits[0], logits[1, 4], logits[2, 3] = torch.nan, torch.nan, torch.inf
    for row in (GREEDY, SamplingParams(1.0), SamplingParams(0.5, top_p=0.5, top_k=3)):
        assert all(0 <= token < 10 for token in sample(logits, [row] * 3, [0] * 3).tolist())


@pytest.mark.parametrize(
    "defaults", [Generation(), Generation(typical_p=0.8, epsilon_cutoff=1e-3, eta_cutoff=1e-3), Generation(top_h=0.6)]
)
def test_choosing_reads_nothing_on_the_host(defaults):
    """Else the host could not be a pass behind: recorded without values, it chooses the same from other logits."""
    rows = [SamplingParams(), SamplingParams(0.8, top_p=0.9, seed=1), SamplingParams(1.2, top_k=5, min_p=0.05, seed=2)]
    logits, generator = torch.zeros(3, 50), torch.Generator().manual_seed(0)
    replay = capture_trace(lambda logits: sample(logits, rows, [0, 3, 9], defaults), (logits,))
    for _ in range(5):
        logits.normal_(generator=generator)
        assert torch.equal(replay(), sample(logits, rows, [0, 3, 9], defaults))


def test_choosing_greedily_is_sampling_at_temperature_zero():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(3)).bfloat16().float()  # with ties
    logits[1, 7], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    tokens, sound = choose_greedily(logits, logits).tolist()
    assert tokens == sample(logits, [GREEDY] * 6, [0] * 6).tolist()
    assert sound == [1, 0, 0, 0, 1, 1]
    processed = logits.clone()
    processed[:, 5] = 100.0
    assert choose_greedily(logits, processed)[0].tolist() == processed.argmax(-1).tolist()
    assert choose_greedily(logits, processed)[1].tolist() == sound


def test_a_host_draws_for_a_few_rows_at_a_time_what_it_would_draw_at_once(monkeypatch):
    """Sorting takes some fifty bytes a logit, so that its memory would grow with rows times vocabulary."""
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    rows = [GREEDY if place % 5 == 0 else SamplingParams(temperature=0.8, seed=place) for place in range(40)]
    steps, sizes = list(range(40)), []
    expected = sample(logits, rows, steps)

    def watched(logits, *others):
        sizes.append(logits.numel())
        return sample(logits, *others)

    monkeypatch.setattr(token_chooser, "sample", watched)
    chooser = token_chooser.TokenChooser(None, NO_DEFAULTS, None, None, None, torch.device("cpu"))
    tokens, sound = chooser._choose_on_host(logits, logits, rows, steps)
    assert torch.equal(tokens, expected)
    assert sound.all()
    assert len(sizes) > 1
    assert max(sizes) <= token_chooser._DRAWN_LOGITS
