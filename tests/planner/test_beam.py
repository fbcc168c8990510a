"""Paths that keep the numbers of devices: the beam search against a search that counts them."""

import itertools

import numpy as np

from ds_llmpq.planner.search.beam import search_beam
from ds_llmpq.planner.search.shortest_path import PathSpace


def random_costs(seed, layers=9, classes=3, longest=4):
    rng = np.random.default_rng(seed)
    stage = rng.uniform(1, 2, (classes, layers, longest)) * np.arange(1, longest + 1)
    stage[rng.random(stage.shape) < 0.2] = np.inf
    stage[:, np.arange(layers)[:, None] + np.arange(longest) >= layers] = np.inf
    return stage, rng.uniform(0, 0.3, (classes, classes)), rng.uniform(0, 0.3, classes)


def cost_of(path, stage, link, final):
    steps = sum(stage[step.kind, step.first, step.last - step.first - 1] for step in path)
    links = sum(link[a.kind, b.kind] for a, b in itertools.pairwise(path))
    return steps + links + final[path[-1].kind]


def test_a_wide_beam_finds_the_best_path_within_the_counts():
    found = none = broken = 0
    for seed in range(60):
        stage, link, final = random_costs(seed)
        counts = ([1, 2, 2], [1, 1, 1], [0, 1, 1])[seed % 3]
        best = PathSpace(3, counts).costs_to_go(stage, link, final)
        free = PathSpace(3, None).costs_to_go(stage, link, final)
        path = search_beam(free, counts, width=10_000)
        if path is None:
            assert np.isinf(best.least)
            none += 1
            continue
        assert [step.first for step in path] == [0, *(step.last for step in path[:-1])]
        assert path[-1].last == 9
        assert all(sum(step.kind == c for step in path) <= counts[c] for c in range(3))
        assert np.isclose(cost_of(path, stage, link, final), best.least)
        narrow = search_beam(free, counts, width=2)
        assert narrow is None or cost_of(narrow, stage, link, final) >= best.least - 1e-12
        found += 1
        broken += free.least < best.least - 1e-12
    assert min(found, broken, none) > 10
