"""Who runs what: stages on ranks, cuts in pipeline layers, devices of a host, ranks against the plan."""

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
from pipeline_cases import make_plan

from ds_llmpq.engine.pipeline_module import PlannedTopology
from ds_llmpq.errors import UserError
from ds_llmpq.launch.environment import find_local_rank, read_rank
from ds_llmpq.plan import Plan


@pytest.mark.parametrize("ranks", [[0], *map(list, list(itertools.permutations(range(4)))[::5])])
def test_topology_follows_the_plan_not_the_rank(ranks):
    topology = PlannedTopology(ranks)
    assert topology.world_size() == len(ranks)
    for stage, rank in enumerate(ranks):
        assert topology.get_coord(rank).pipe == stage
        assert topology.get_rank(pipe=stage, data=0) == rank
    assert topology.get_axis_comm_lists("pipe") == [ranks]


def test_bounds_add_embedding_and_head():
    def bounds_of(stages):
        return Plan.parts(SimpleNamespace(stages=[SimpleNamespace(layers=layers) for layers in stages]), 1, 1)

    assert bounds_of([(0, 5)]) == [0, 7]
    assert bounds_of([(0, 1), (1, 4), (4, 5)]) == [0, 2, 5, 7]
    generator = random.Random(0)
    for _ in range(50):
        layers = generator.randint(1, 40)
        cuts = sorted(generator.sample(range(1, layers), generator.randint(0, min(layers - 1, 6))))
        stages = list(itertools.pairwise([0, *cuts, layers]))
        bounds = bounds_of(stages)
        owned = [set(range(start, stop)) for start, stop in itertools.pairwise(bounds)]
        assert set().union(*owned) == set(range(layers + 2))
        for (first, last), pipeline_layers in zip(stages, owned, strict=True):
            decoder = {index - 1 for index in pipeline_layers} - {-1, layers}
            assert decoder == set(range(first, last))
        assert 0 in owned[0]
        assert layers + 1 in owned[-1]


@pytest.fixture
def plan(checkpoint_of):
    """Stages 0..3 on ranks 2, 0, 3, 1; ranks 0 and 1 on host a, 2 and 3 on host b."""
    made = make_plan(checkpoint_of("llama"), [(0, 1), (1, 2), (2, 3), (3, 5)], ranks=[2, 0, 3, 1])
    stages = tuple(dataclasses.replace(stage, host="ab"[stage.rank // 2]) for stage in made.stages)
    return dataclasses.replace(made, stages=stages)


def test_local_rank_counts_within_the_host(plan):
    assert [find_local_rank(plan, rank) for rank in range(4)] == [0, 1, 0, 1]
    stages = tuple(dataclasses.replace(stage, host="aaab"[stage.rank]) for stage in plan.stages)
    assert [find_local_rank(dataclasses.replace(plan, stages=stages), rank) for rank in range(4)] == [0, 1, 2, 0]


@pytest.fixture
def launched(monkeypatch):
    """launched(plan, rank, world_size, on_host): what a process concludes from the launcher's environment."""

    def conclude(plan, rank, world_size, on_host=2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_SIZE", on_host)):
            monkeypatch.setenv(name, str(value))
        return read_rank(plan)

    return conclude


def test_ranks_that_are_not_the_plan_s(plan, launched, monkeypatch):
    assert [launched(plan, rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"4 stages, but 3 ranks started"):
        launched(plan, 0, 3)
    with pytest.raises(UserError, match=r"puts 2 stages on host b, but 3 ranks"):
        launched(plan, 2, 4, on_host=3)
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match=r"RANK and WORLD_SIZE are not set"):
        read_rank(plan)


@pytest.mark.parametrize("ranks", [[0, 1, 1, 2], [1, 2, 3, 4]])
def test_stages_must_have_the_ranks_from_zero_up(plan, ranks, launched):
    stages = tuple(dataclasses.replace(stage, rank=rank) for stage, rank in zip(plan.stages, ranks, strict=True))
    for rank in range(4):
        with pytest.raises(UserError, match=r"each from 0 to 3"):
            launched(dataclasses.replace(plan, stages=stages), rank, 4)
