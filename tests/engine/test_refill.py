"""Slots that take the next request when one ends: the same answers as one at a time, on every cut, in every order."""

import dataclasses
import random

import pytest
from pipeline_cases import LAYERS, Case, Draw, make_plan, reference
from test_finish import POISON, greedy, poisoned, prompts_of, rows_of  # noqa: F401 -- a fixture

from ds_llmpq.scheduler.request_group import RequestGroup
from ds_llmpq.scheduler.slot_table import Finish

THREE = [(0, 2), (2, 3), (3, LAYERS)]


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    return checkpoint_of("llama")


def joining(rows, count, slots, capacity):
    """Groups of `count` rows of one shape, each joining the one before."""
    parts = (rows[start : start + count] for start in range(0, len(rows), count))
    return tuple(RequestGroup(part, slots, capacity, joins=True) for part in parts)


def flat(outcome, groups):
    return [tokens for index in range(len(groups)) for tokens in outcome.tokens(index)]


def test_random_streams_answer_as_one_at_a_time(ranks, llama):
    """20 requests through few slots on 1 to 3 stages: cuts, ranks, micro-batches, patience and groups at random."""
    model, draw = reference(llama), Draw(7)
    rows = tuple(draw.row(key, model, longest=12, most=9) for key in range(20))
    wanted = [model.generate([row.prompt], row.max_tokens)[0] for row in rows]
    eos = (wanted[3][0], wanted[5][-1])
    wanted = [model.generate([row.prompt], row.max_tokens, eos)[0] for row in rows]
    for stages in (1, 2, 3):
        cases = []
        for seed in range(4):
            dice = random.Random(10 * stages + seed)
            slots = dice.randint(1, 8)
            plan = make_plan(
                llama, draw.cuts(stages), None, draw.permutation(stages), (dice.randint(1, 4), dice.randint(1, 4)),
                workload=(slots, 12, 12),
            )  # fmt: skip
            groups = joining(rows, dice.randint(1, 9), slots, 24)
            options = {"patience_rounds": dice.randint(0, 3), "batch_invariant": dice.random() < 0.3}
            cases.append(Case(llama, plan, groups, eos, label=f"{stages} stages, seed {seed}", options=options))
        for case, outcome in zip(cases, ranks.run(*cases), strict=True):
            assert flat(outcome, case.groups) == wanted, case.label
            [lengths] = outcome.ranks[0]["lengths"]
            assert sorted(map(tuple, lengths)) == sorted(
                (len(row.prompt), len(tokens)) for row, tokens in zip(rows, wanted, strict=True)
            ), case.label


def test_a_wave_of_another_shape_waits_for_the_end(ranks, llama):
    prompts = prompts_of([3, 4, 2, 9, 5])
    rows = rows_of(prompts, 5)
    groups = (
        RequestGroup(rows[:2], 2, 12, joins=True),
        RequestGroup(rows[2:3], 2, 12, joins=True),
        RequestGroup(rows[3:], 1, 24, joins=True),
    )
    plan = make_plan(llama, THREE, workload=(2, 6, 6))
    [out] = ranks.run(Case(llama, plan, groups))
    assert flat(out, groups) == greedy(llama, prompts, 5)
    assert [len(lengths) for lengths in out.ranks[0]["lengths"]] == [3, 2]


def test_a_full_slot_hands_its_sequence_back(ranks, llama):
    """Slots of 8 positions for sequences that need up to 15: they come back with their tokens and end all the same."""
    model, draw = reference(llama), Draw(11)
    rows = tuple(draw.row(key, model, longest=5, most=10) for key in range(6))
    wanted = [model.generate([row.prompt], row.max_tokens)[0] for row in rows]
    groups = joining(rows, 6, 3, 8)
    assert any(row.max_kv_tokens > 9 for row in rows)
    [out] = ranks.run(Case(llama, make_plan(llama, THREE, workload=(6, 8, 8)), groups))
    assert out.tokens() == wanted
    assert sum(map(len, out.ranks[0]["lengths"])) > 6, "none came back"


def test_the_next_sequence_of_a_broken_one_s_slot_is_sound(ranks, poisoned):  # noqa: F811
    """The poisoned row leaves NaN in its slot, which goes along in other rows' passes before it is refilled."""
    for name in ("llama", "bloom"):
        path, prompts = poisoned[name], prompts_of([6, 3, 9, 4, 2, 7, 5, 8])
        rows = rows_of(prompts, [8, 3, 8, 2, 6, 3, 7, 5])
        bad = dataclasses.replace(rows[1], prompt=(POISON, *rows[1].prompt))
        groups = joining((rows[0], bad, *rows[2:]), 8, 3, 20)
        plan = make_plan(path, THREE, micro_batch=(2, 3), workload=(3, 10, 10))
        [out] = ranks.run(Case(path, plan, groups, options={"patience_rounds": 2}))
        assert out.finish() == [Finish.LENGTH, Finish.NAN_LOGITS, *[Finish.LENGTH] * 6]
        for place, row in enumerate(rows):
            if place != 1:
                assert out.tokens()[place] == greedy(path, [row.prompt], row.max_tokens)[0], f"{name} row {place}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_invariant_logits_do_not_depend_on_company(ranks, llama, dtype):
    """Bit for bit: alone, together, in another order, through few or many slots of the same decode micro-batch."""
    rows = rows_of(prompts_of([5, 12, 3, 8, 1, 9, 7]), 6)
    shuffled = tuple(random.Random(3).sample(rows, len(rows)))
    plan = make_plan(llama, THREE, micro_batch=(3, 2), workload=(6, 12, 12), dtype=dtype)
    options = {"batch_invariant": True}

    def logits(part, slots):
        [out] = ranks.run(Case(llama, plan, joining(part, 3, slots, 24), logits=True, options=options))
        keys = [row.key for row in part]
        return {(keys[3 * (key // 1000) + key % 1000], at): values for key, at, values in out.stage(2)["logits"]}

    together = logits(rows, 6)
    assert len(together) == len(rows) * 6
    for other in (logits(shuffled, 2), logits(rows[4:5], 2), logits(shuffled, 4)):
        assert all(together[key] == values for key, values in other.items())
