"""Which prefix is shared, against trying all; and that sequences of different pasts do not pass together."""

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.scheduler import prefix
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.prefix import find_shared_prefix
from ds_llmpq.scheduler.scheduler import Scheduler


def count_saved(prompts, begin):
    return len(begin) * (sum(tuple(p[: len(begin)]) == begin and len(p) > len(begin) for p in prompts) - 1)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=9), st.sampled_from([1, 2, 3])
)
def test_none_saves_more(prompts, block):
    """Tokens are large, so that order by bytes is not order by number."""
    prompts = [array("i", [300 * token + 7 for token in prompt]) for prompt in prompts]
    least, share = prefix._LEAST_TOKENS, prefix._LEAST_SHARE
    prefix._LEAST_TOKENS, prefix._LEAST_SHARE = 1, 0.0
    try:
        found = find_shared_prefix(prompts, 6, block)
    finally:
        prefix._LEAST_TOKENS, prefix._LEAST_SHARE = least, share
    every = {tuple(p[:n]) for p in prompts for n in range(block, min(len(p) - 1, 6) + 1, block)}
    best = max((count_saved(prompts, begin) for begin in every), default=0)
    assert count_saved(prompts, found) == max(best, 0) if found else best <= 0
    assert len(found) % block == 0


def test_what_is_not_worth_it():
    common = list(range(100))
    prompts = [array("i", [*common, key]) for key in range(10)]
    assert find_shared_prefix(prompts, 1000) == tuple(common)
    assert find_shared_prefix(prompts, 1000, block=32) == tuple(common[:96])
    assert find_shared_prefix(prompts, 40) == tuple(common[:40])
    assert find_shared_prefix([array("i", common)] * 5, 1000) == tuple(common[:-1]), "the last token is computed"
    assert find_shared_prefix(prompts, 31) == find_shared_prefix([], 9) == find_shared_prefix(prompts[:1], 99) == ()
    others = [array("i", [1000 + key] * 200) for key in range(200)]
    assert find_shared_prefix(prompts + others, 1000) == (), "a fiftieth of all tokens"
    assert find_shared_prefix(prompts * 30 + others, 1000) != ()


def test_many_prompts_are_looked_at_evenly():
    """More than are looked at, sorted so that the first of them share nothing."""
    common = tuple(range(50))
    prompts = [array("i", [key + 100, *common]) for key in range(3000)]
    prompts += [array("i", [*common, key]) for key in range(9000)]
    assert find_shared_prefix(prompts, 100) == common


@pytest.mark.parametrize("seed", range(40))
def test_long_prompts_pass_in_chunks_and_decode_goes_on(seed):
    """Each token of each prompt once and in order; at each visit one chunk of a prompt that has begun."""
    dice = random.Random(seed)
    lengths = [(dice.choice((2, 5, 23)), dice.randint(1, 4)) for _ in range(12)]
    slots, budget = dice.randint(1, 5), dice.randint(1, 9)
    scheduler = Scheduler(slots, MicroBatchLimits(2, budget, dice.randint(1, 3), patience_rounds=0, chunked=True))
    scheduler.add((prompt for prompt, _ in lengths), [1] * len(lengths))
    holds, left, computed = [-1] * slots, [0] * slots, [1] * len(lengths)
    while scheduler.next_group() is not None:
        batches = scheduler.schedule(lambda slot: left[slot] == 0)
        assert sum(batch.phase == "prefill" and not batch.sequences for batch in batches) <= 1
        for batch in batches:
            for slot, number in zip(batch.slots, batch.sequences, strict=False):
                holds[slot], left[slot] = number, lengths[number][1]
            if batch.phase == "prefill":
                numbers = [holds[slot] for slot in batch.slots]
                assert {computed[number] for number in numbers} == {batch.past}
                new = [batch.tokens or lengths[number][0] - batch.past for number in numbers]
                assert len(new) * max(new) <= budget
                for number, count in zip(numbers, new, strict=True):
                    computed[number] += count
                whole = all(computed[number] == lengths[number][0] for number in numbers)
                assert batch.live == (batch.slots if whole else ())
            for slot in batch.live:
                assert computed[holds[slot]] == lengths[holds[slot]][0]
                left[slot] -= 1
    assert computed == [prompt for prompt, _ in lengths]
    assert left == [0] * slots or len(lengths) < slots


def test_a_long_prompt_holds_up_no_decode_for_longer_than_a_chunk():
    scheduler = Scheduler(2, MicroBatchLimits(1, 10, 2, patience_rounds=0, chunked=True))
    scheduler.add([5, 60])
    phases = ""
    while len(phases) < 16:
        phases += "".join(batch.phase[0] for batch in scheduler.schedule(lambda slot: False))
    assert phases.startswith("pp" + "pd" * 5)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_prefill_micro_batch_stand_at_the_same_positions(seed):
    dice = random.Random(seed)
    prompts = [dice.randint(6, 20) for _ in range(15)]
    shared = [dice.choice((0, 5)) for _ in prompts]
    limits = MicroBatchLimits(dice.randint(1, 5), 40, 3, patience_rounds=0)
    scheduler = Scheduler(dice.randint(1, 6), limits)
    scheduler.add(prompts, shared)
    seen = []
    while scheduler.next_group() is not None:
        for batch in scheduler.schedule(lambda slot: True):
            assert {shared[number] for number in batch.sequences} <= {batch.past}
            longest = max((prompts[number] - batch.past for number in batch.sequences), default=0)
            assert batch.size == 1 or batch.size * longest <= 40 or batch.phase == "decode"
            seen += batch.sequences
    assert seen == list(range(len(prompts)))
