"""How rows end, over the pipeline: rules asked on the last stage, rows that break, groups that share one store."""

import dataclasses
import shutil
import time

import pytest
import torch
from pipeline_cases import LAYERS, VOCABULARY, Case, make_plan, reference
from safetensors.torch import load_file, save_file

from ds_llmpq.engine.sampling import sample
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

THREE = [(0, 2), (2, 3), (3, LAYERS)]
POISON = 77  # a token whose embedding is not a number in poisoned checkpoints


def rows_of(prompts, max_tokens, **options):
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    return tuple(
        Sequence(key, prompt, limit, **options) for key, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    )


def prompts_of(lengths, seed=0):
    """Random prompts without the poisoned token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, VOCABULARY - 1, (length,), generator=generator).tolist() for length in lengths]
    return [tuple(token + (token >= POISON) for token in row) for row in tokens]


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    return checkpoint_of("llama")


@pytest.fixture(scope="module")
def poisoned(llama, checkpoint_of, tmp_path_factory):
    """Checkpoints like llama's and BLOOM's in which one token's embedding is NaN."""
    made = {}
    for name, tensor in (("llama", "model.embed_tokens.weight"), ("bloom", "transformer.word_embeddings.weight")):
        made[name] = tmp_path_factory.mktemp("poisoned") / name
        shutil.copytree(checkpoint_of(name), made[name])
        tensors = load_file(made[name] / "model.safetensors")
        if name == "bloom":  # a tied head would break every row: an untied one
            tensors["lm_head.weight"] = tensors[tensor].clone()
            config = (made[name] / "config.json").read_text()
            (made[name] / "config.json").write_text(
                config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
            )
        tensors[tensor][POISON] = torch.nan
        save_file(tensors, made[name] / "model.safetensors", metadata={"format": "pt"})
    return made


def greedy(path, prompts, limits, eos=()):
    model = reference(path)
    limits = limits if isinstance(limits, list) else [limits] * len(prompts)
    return [model.generate([prompt], limit, eos)[0] for prompt, limit in zip(prompts, limits, strict=True)]


def test_one_token_each_needs_no_decode_pass(ranks, llama):
    prompts = prompts_of([3, 1, 8, 5])
    [out] = ranks.run(Case(llama, make_plan(llama, THREE), (RequestGroup(rows_of(prompts, 1)),)))
    assert out.tokens() == greedy(llama, prompts, 1)
    assert out.finish() == [Finish.LENGTH] * 4
    assert [out.stage(index)["passes"]["decode"] for index in range(3)] == [0, 0, 0]


def test_end_of_sequence_at_once(ranks, llama):
    """The first token of the first two rows ends them, as a whole decode group; the others go on."""
    prompts = prompts_of([3, 1, 8, 5])
    free = greedy(llama, prompts, 6)
    eos = (free[0][0], free[1][0])
    wanted = greedy(llama, prompts, 6, eos)
    assert [len(tokens) for tokens in wanted[:2]] == [1, 1]
    assert max(map(len, wanted)) > 2
    [out] = ranks.run(
        Case(llama, make_plan(llama, THREE, micro_batch=(3, 2)), (RequestGroup(rows_of(prompts, 6)),), eos)
    )
    assert out.tokens() == wanted
    assert out.finish()[:2] == [Finish.STOP] * 2
    assert out.order()[:2] == [0, 1]


def test_groups_end_in_different_rounds(ranks, llama):
    """Each group's passes end with its longest row, on every stage."""
    prompts, limits = prompts_of([4, 2, 7, 3, 5, 1]), [2, 9, 3, 3, 1, 6]
    plan = make_plan(llama, THREE, micro_batch=(4, 2))
    [out] = ranks.run(Case(llama, plan, (RequestGroup(rows_of(prompts, limits)),)))
    assert out.tokens() == greedy(llama, prompts, limits)
    for index in range(3):
        assert out.stage(index)["passes"]["decode"] == (9 - 1) + (3 - 1) + (6 - 1)
        assert out.stage(index)["passes"]["prefill"] == 2
    assert out.stage(2)["passes"]["sample"] == 2 + 15
    assert out.stage(0)["passes"]["sample"] == 0


def test_the_last_stage_decides(ranks, llama):
    """A rule that the other stages could not know ends every row at its fourth token."""
    prompts = prompts_of([4, 2, 7])
    [out] = ranks.run(Case(llama, make_plan(llama, THREE), (RequestGroup(rows_of(prompts, [9, 3, 9])),), every=4))
    assert [len(tokens) for tokens in out.tokens()] == [4, 3, 4]
    assert out.finish() == [Finish.STOP, Finish.LENGTH, Finish.STOP]


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_broken_row_breaks_no_other(ranks, poisoned, name):
    """Neither its neighbours in the micro-batch nor the rows that get its place in the store in a later group."""
    path = poisoned[name]
    prompts = prompts_of([6, 3, 9, 4, 2, 7])
    bad = [list(prompt) for prompt in prompts]
    bad[1][1], bad[3][0], bad[5][6] = POISON, POISON, POISON
    first = rows_of([tuple(prompt) for prompt in bad], 8)
    later = rows_of(prompts_of([2, 11, 5, 3], seed=1), 10)
    plan = make_plan(path, THREE, micro_batch=(6, 6), workload=(6, 11, 10))
    [out] = ranks.run(Case(path, plan, (RequestGroup(first), RequestGroup(later))))
    broken = [row == 1 or row == 3 or row == 5 for row in range(6)]
    assert out.finish(0) == [Finish.NAN_LOGITS if bad else Finish.LENGTH for bad in broken]
    for row, tokens in enumerate(out.tokens(0)):
        if broken[row]:
            assert len(tokens) == 1
        else:
            assert tokens == greedy(path, [prompts[row]], 8)[0]
    assert out.finish(1) == [Finish.LENGTH] * 4
    assert out.tokens(1) == greedy(path, [row.prompt for row in later], 10)


def test_a_row_that_breaks_while_it_generates(ranks, llama, tmp_path):
    """The poisoned token is one that a row itself generates: it ends with the token after."""
    prompts = prompts_of([5, 8, 3])
    wanted = greedy(llama, prompts, 8)
    generated_only_by_first = set(wanted[0][2:5]) - set(wanted[1]) - set(wanted[2]) - {t for p in prompts for t in p}
    token = min(generated_only_by_first)
    path = tmp_path / "poisoned"
    shutil.copytree(llama, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    [out] = ranks.run(Case(path, make_plan(path, THREE, micro_batch=(3, 3)), (RequestGroup(rows_of(prompts, 8)),)))
    assert out.finish() == [Finish.NAN_LOGITS, Finish.LENGTH, Finish.LENGTH]
    at = wanted[0].index(token)
    assert out.tokens()[0][:-1] == wanted[0][: at + 1]
    assert out.tokens()[1:] == wanted[1:]


def test_infinite_logits_are_broken_too(ranks, llama, tmp_path):
    """An overflow in a narrow type gives infinities before it gives NaN."""
    path = tmp_path / "overflowing"
    shutil.copytree(llama, path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][5, 0], tensors["lm_head.weight"][6, 0] = torch.inf, -torch.inf  # one of them is +inf
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    rows = rows_of(prompts_of([5, 8]), 3, sampling=SamplingParams(1.0, seed=3))
    [out] = ranks.run(Case(path, make_plan(path, THREE), (RequestGroup(rows),)))
    assert out.finish() == [Finish.NAN_LOGITS] * 2


def test_waves_of_all_sizes_share_one_store(ranks, llama):
    """8 short rows, then one that is longer than any the plan expected, then 3, in 8 * (6 + 6) slots."""
    sizes = [([4, 6, 1, 5, 2, 3, 6, 4], 6), ([70], 26), ([12, 30, 9], 2), ([1], 1), ([3, 5], 20)]
    prompts = [prompts_of(lengths, seed) for seed, (lengths, _) in enumerate(sizes)]
    groups = tuple(RequestGroup(rows_of(part, most)) for part, (_, most) in zip(prompts, sizes, strict=True))
    plan = make_plan(llama, THREE, ranks=[2, 0, 1], micro_batch=(2, 3), workload=(8, 6, 6))
    [out] = ranks.run(Case(llama, plan, groups))
    for index, (part, (_, most)) in enumerate(zip(prompts, sizes, strict=True)):
        assert out.tokens(index) == greedy(llama, part, most), f"group {index}"


def test_more_than_the_planned_slots_is_refused(ranks, llama):
    plan = make_plan(llama, [(0, LAYERS)], workload=(2, 6, 6))
    reply = ranks.reply(Case(llama, plan, (RequestGroup(rows_of(prompts_of([5, 9]), 4)),)))
    assert "UserError: 2 sequences of 13 tokens need 26 cache positions, but the plan has 24" in reply["problem"]


def test_seeded_sampling_depends_on_the_request_alone(ranks, llama):
    """Not on cut, micro-batches or neighbours; and it is what sampling from transformers' logits gives."""
    prompts = prompts_of([4, 9, 2, 6])
    rows = tuple(
        dataclasses.replace(row, sampling=SamplingParams(0.9, top_p=0.9, top_k=30, seed=50 + row.key))
        for row in rows_of(prompts, 7)
    )
    one = Case(llama, make_plan(llama, THREE, micro_batch=(4, 4)), (RequestGroup(rows),))
    other = Case(llama, make_plan(llama, [(0, 1), (1, 4), (4, 5)], micro_batch=(1, 3)), (RequestGroup(rows[::-1]),))
    first, second = ranks.run(one, other)
    assert first.tokens() == second.tokens()[::-1]
    model = reference(llama)
    for row, tokens in zip(rows, first.tokens(), strict=True):
        logits = model.logits(row.prompt + tuple(tokens))[len(row.prompt) - 1 : -1]
        assert sample(logits, [row.sampling] * 7, list(range(7))).tolist() == tokens
    assert first.tokens() != greedy(llama, prompts, 7)


def test_a_rank_that_dies_ends_the_others(ranks, llama):
    started = time.monotonic()
    case = Case(llama, make_plan(llama, THREE), (RequestGroup(rows_of(prompts_of([5, 8]), 8)),), dies=1)
    reply = ranks.reply(case, timeout=300, expect_death=True)
    assert reply["codes"][1] == 7
    assert all(code not in (0, None) for code in reply["codes"]), reply["codes"]
    assert time.monotonic() - started < 300  # far below the time-out of the process group
