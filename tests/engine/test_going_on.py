"""Sequences that go on from their tokens, as after a death: greedy or seeded, they end as in a quiet run in float32."""

import random
from dataclasses import replace

import pytest
from pipeline_cases import LAYERS, Case, make_plan
from test_finish import prompts_of
from test_oom_split import greedy

from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams

LIMIT = 12


@pytest.mark.parametrize("stages", [[(0, LAYERS)], [(0, 2), (2, LAYERS)]])
def test_from_any_of_their_tokens(ranks, checkpoint_of, stages):
    """Cut anywhere, even before the first token; the draws of a seed go on where they were."""
    path, rng = checkpoint_of("llama"), random.Random(5)
    prompts = prompts_of([6, 3, 9, 4, 2, 7, 5, 8])
    rows = [
        Sequence(key, prompt, LIMIT, SamplingParams(0.9, 0.95, 20, seed=40 + key) if key % 2 else GREEDY)
        for key, prompt in enumerate(prompts)
    ]
    plan = make_plan(path, stages, micro_batch=(3, 2), workload=(4, 9, LIMIT))

    def served(rows):
        [out] = ranks.run(Case(path, plan, (RequestGroup(tuple(rows), 4, 9 + LIMIT, joins=True),)))
        return out

    quiet = served(rows).tokens()
    assert quiet[::2] == greedy(path, prompts, LIMIT)[::2]
    assert quiet[1::2] != greedy(path, prompts, LIMIT)[1::2]
    for _ in range(3):
        cuts = [rng.randrange(LIMIT) for _ in rows]
        begun = [
            replace(row, generated=tuple(tokens[:cut])) for row, tokens, cut in zip(rows, quiet, cuts, strict=True)
        ]
        out = served(begun)
        assert out.tokens() == quiet
        made = sum(generated for stream in out.stage(0)["lengths"] for _, generated in stream)
        assert made == sum(LIMIT - cut for cut in cuts)  # none is made again


def test_the_driver_is_told_of_each_token_of_rows_that_go_on(ranks, checkpoint_of):
    path = checkpoint_of("llama")
    prompts = prompts_of([3, 5, 4])
    plan = make_plan(path, [(0, 2), (2, LAYERS)], micro_batch=(3, 2), workload=(2, 9, LIMIT))
    rows = tuple(Sequence(key, prompt, (1, 4, LIMIT)[key]) for key, prompt in enumerate(prompts))
    [out] = ranks.run(Case(path, plan, (RequestGroup(rows, 2, 9 + LIMIT, joins=True),)))
    told = next(rank["told"] for rank in out.ranks if rank["told"] is not None)
    for key, tokens in enumerate(out.tokens()):
        assert [token for row, token in told if row == key] == tokens[:-1]
