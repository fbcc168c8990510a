"""Sequences behind a prefix that is computed once: the tokens of transformers, from fewer computed prompt tokens."""

import dataclasses
import random

import pytest
from pipeline_cases import LAYERS, VARIANTS, VOCABULARY, Case, Draw, make_plan, reference
from test_finish import POISON, greedy, poisoned  # noqa: F401 -- a fixture

from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

MOST = 8
TWO = [(0, 2), (2, LAYERS)]


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    return checkpoint_of("llama")


def drawn_case(path, stages, seed, bits=(), options=None, share=True) -> tuple[Case, list[list[int]]]:
    """A dozen requests through few slots: most go on behind the prefix, some are it, end in it, or have another.
    Without `share` the same prompts are computed whole."""
    draw = Draw(seed)
    dice, model = draw.random, reference(path, bits)
    prefix = tuple(dice.randrange(VOCABULARY) for _ in range(dice.randint(3, 40)))
    end = dice.choice((len(prefix) - 1, min(len(prefix) - 1, MOST)))  # long rows without it need long slots
    begins = [prefix] * 8 + [prefix[: dice.randint(1, end)], prefix[:end], (), ()]
    rows = []
    for key, begin in enumerate(dice.sample(begins, len(begins))):
        for _ in range(50):
            prompt, most = begin + draw.prompt(MOST), dice.randint(1, MOST)
            if len(rows) % 5 == 3 and begin:
                prompt = begin
            tokens = model.generate([prompt], most)[0]
            if model.has_clear_gaps(prompt, tokens):
                break
        else:
            raise AssertionError(f"seed {seed}: no prompt with clear gaps")
        rows.append((Sequence(key, prompt, most), tokens))
    own = [len(row.prompt) + row.max_tokens - share * len(prefix) * begins_with(row, prefix) for row, _ in rows]
    slots, capacity, most = dice.randint(1, 6), max(own), len(prefix) + 2 * MOST
    plan = make_plan(
        path, draw.cuts(stages), list(bits) or None, draw.permutation(stages),
        (dice.randint(1, 5), dice.randint(1, 4)), (slots, most - MOST, MOST, len(prefix), capacity),
    )  # fmt: skip
    group = RequestGroup(tuple(row for row, _ in rows), slots, capacity, joins=True)
    options = {"patience_rounds": dice.randint(0, 3)} | (options or {})
    label = f"seed {seed} {path.name} {plan.micro_batch} prefix {len(prefix)}"
    case = Case(path, plan, (group,), label=label, options=options, prefix=prefix * share)
    return case, [tokens for _, tokens in rows]


def test_long_prompts_in_chunks_are_token_identical(ranks, checkpoint_of):
    """Budgets down to one token, shorter than windows and prefix; a prefix may come in chunks itself."""
    for stages in (1, 2, 3):
        drawn = []
        for index, name in enumerate(("llama", "mistral-window", "opt", "bloom", "gemma2", "qwen2-window", "mixtral")):
            seed = 300 * stages + index
            budget = random.Random(seed).choice((1, 3, 7, 12))
            bits = Draw(seed).bits() if index % 3 == 2 else ()
            drawn.append(
                drawn_case(checkpoint_of(name), stages, seed, bits, {"prefill_tokens": budget}, bool(index % 2))
            )
        check(ranks, drawn)


def count_prefill(case: Case) -> int:
    """Prompt tokens that each stage has to compute."""
    tokens, prefix = len(case.prefix), case.prefix
    for row in case.groups[0].sequences:
        tokens += len(row.prompt) - len(prefix) * begins_with(row, prefix)
    return tokens


def begins_with(row: Sequence, prefix: tuple[int, ...]) -> bool:
    """And goes on."""
    return len(row.prompt) > len(prefix) and row.prompt[: len(prefix)] == prefix


def check(ranks, drawn) -> None:
    for (case, expected), outcome in zip(drawn, ranks.run(*(case for case, _ in drawn)), strict=True):
        assert outcome.tokens() == expected, case.label
        for rank in outcome.ranks:
            assert rank["report"]["tokens"]["prefill"] == count_prefill(case), case.label


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_architecture_is_token_identical(ranks, checkpoint_of, stages):
    """Windows are shorter than most prefixes; positions are rotary, learned or ALiBi's."""
    check(
        ranks,
        [drawn_case(checkpoint_of(name), stages, 100 * stages + index) for index, name in enumerate(VARIANTS)],
    )


def test_mixed_bits_and_captured_decode_passes(ranks, checkpoint_of):
    drawn = []
    for index, name in enumerate(("llama", "bloom", "gemma2", "qwen3-moe")):
        bits, options = Draw(40 + index).bits(), {"decode_graphs": index % 2 == 0}
        drawn.append(drawn_case(checkpoint_of(name), 2, 40 + index, bits, options))
    check(ranks, drawn)


def test_sampled_and_penalized_rows_are_those_of_whole_prefill(ranks, checkpoint_of):
    """Draws follow a row's own seed, and penalties count the prefix's tokens."""
    path, dice = checkpoint_of("llama"), random.Random(2)
    prefix = tuple(dice.randrange(VOCABULARY) for _ in range(20))
    rows = tuple(
        Sequence(
            key,
            (*prefix, *(dice.randrange(VOCABULARY) for _ in range(1 + key))),
            12,
            SamplingParams(0.8, seed=key, repetition_penalty=1.5, presence_penalty=0.5 * key),
        )
        for key in range(4)
    )
    plan = make_plan(path, TWO, workload=(4, 24, 12, 20, 36))
    case = Case(path, plan, (RequestGroup(rows, 4, 36, joins=True),))
    behind = dataclasses.replace(case, groups=(RequestGroup(rows, 4, 16, joins=True),), prefix=prefix)
    whole, shared = ranks.run(case, behind)
    assert whole.tokens() == shared.tokens()
    assert shared.stage(1)["report"]["tokens"]["prefill"] == count_prefill(behind)


def test_sequences_go_on_from_their_tokens(ranks, checkpoint_of):
    """As after a death, even where the prompt alone ends with the prefix."""
    path = checkpoint_of("mistral-window")
    case, expected = drawn_case(path, 2, 7)
    [group] = case.groups
    begun = tuple(
        dataclasses.replace(row, generated=tuple(tokens[: (row.key * 3) % len(tokens)]))
        for row, tokens in zip(group.sequences, expected, strict=True)
    )
    [out] = ranks.run(dataclasses.replace(case, groups=(dataclasses.replace(group, sequences=begun),)))
    assert out.tokens() == expected


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_prefix_that_cannot_be_computed_is_not_shared(ranks, poisoned, name):  # noqa: F811
    """Rows with it end as they would have, and the others are served."""
    path, sound = poisoned[name], (4, 9, 2, 7, 5)
    prefix = (5, POISON, 8)
    rows = tuple(Sequence(key, (*begin, *sound), 5) for key, begin in enumerate([prefix, (3,), prefix, (6, 1)]))
    plan = make_plan(path, TWO, workload=(4, 12, 8, 3))
    [out] = ranks.run(Case(path, plan, (RequestGroup(rows, 2, 20, joins=True),), prefix=prefix))
    assert out.finish() == [Finish.NAN_LOGITS, Finish.LENGTH, Finish.NAN_LOGITS, Finish.LENGTH]
    assert [out.tokens()[1], out.tokens()[3]] == greedy(path, [rows[1].prompt, rows[3].prompt], 5)


def test_a_row_that_is_given_up_harms_no_other_with_the_prefix(ranks, poisoned):  # noqa: F811
    """Its slot is refilled by a sound one, which takes the prefix over anew."""
    path, prefix = poisoned["llama"], (5, 3, 8, 1, 6)
    rest = [(4,), (POISON, 2), (7, 7), (1, 2, 3), (9,), (2, 8)]
    rows = tuple(Sequence(key, (*prefix, *tokens), 3 + key % 3) for key, tokens in enumerate(rest))
    plan = make_plan(path, TWO, micro_batch=(2, 1), workload=(2, 12, 12, 5))
    [out] = ranks.run(Case(path, plan, (RequestGroup(rows, 2, 8, joins=True),), prefix=prefix))
    assert out.finish()[1] is Finish.NAN_LOGITS
    for key in (0, 2, 3, 4, 5):
        assert out.tokens()[key] == greedy(path, [rows[key].prompt], rows[key].max_tokens)[0], key
