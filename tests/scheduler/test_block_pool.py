"""Sequences that share the blocks of a KV cache: nobody's block is another's, and every sequence runs to its end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llmpq.errors import UserError
from ds_llmpq.scheduler.block_pool import HORIZON_TOKENS, BlockPool
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.scheduler import Scheduler
from ds_llmpq.scheduler.simulator import simulate

BLOCK = 4
LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=25)


class Player:
    """Runs a scheduler to its end; a micro-batch's tokens are known at once. `lengths`: prompt and generated tokens of
    each sequence, and how many more it might have generated."""

    def __init__(self, lengths, slots, limits, shared=0):
        self.lengths, self.limits = lengths, limits
        self.scheduler = Scheduler(slots, limits)
        prompts = [prompt for prompt, _, _ in lengths]
        self.scheduler.add(prompts, [shared] * len(lengths), [sum(entry) for entry in lengths])
        self.shared = shared
        self.holds, self.stored, self.tokens = {}, {}, [0] * len(lengths)
        self.preempted, self.passes, self.order, self.ahead = [], [], [], 0
        while self.scheduler.next_group() is not None:
            self.visit()

    def visit(self):
        group, before = self.scheduler.next_group(), dict(self.holds)
        running = {s for s in group if s in before and not self.ended(s)}
        batches = self.scheduler.schedule(self.ended)
        for slot, number in self.scheduler.preempted:
            assert slot in running
            assert before[slot] == number
            youngest = [number for other, number in before.items() if other in running]
            assert number == max(youngest)
            running.discard(slot)
            self.preempted.append(number)
        for batch in batches:
            assert list(batch.slots) == sorted(set(batch.slots))
            self.note(batch)
        pool = self.scheduler.pool
        blocks = [block for table in pool.tables for block in table]
        assert len(blocks) == len(set(blocks)) == pool.blocks - pool.free
        assert set(blocks) <= set(range(pool.blocks))
        self.passes += batches
        ahead = self.scheduler.forecast(lambda slot: slot not in self.holds or self.ended(slot))
        if ahead is not None:
            assert all(map(pool.has_place, ahead.live)), "a pass ahead knows where its tokens go"
            self.ahead += self.limits.row_buckets
        assert len(self.passes) < 20000

    def note(self, batch):
        self.order += sorted(batch.sequences)
        for slot, number in zip(batch.slots, batch.sequences, strict=False):
            self.holds[slot], self.stored[slot] = number, self.shared
        for slot in batch.slots:
            whole = self.lengths[self.holds[slot]][0] + self.tokens[self.holds[slot]]
            if batch.phase == "prefill":
                assert batch.past == self.stored[slot]
                self.stored[slot] = batch.past + batch.tokens if batch.tokens else whole
            else:
                assert batch.live == batch.slots
                assert self.stored[slot] == whole - 1
                self.stored[slot] = whole
            room = len(self.scheduler.pool.tables[slot]) * self.limits.block_tokens
            assert self.stored[slot] - self.shared <= room
            if slot in batch.live:
                assert self.stored[slot] == whole
                self.tokens[self.holds[slot]] += 1

    def ended(self, slot):
        return self.tokens[self.holds[slot]] >= self.lengths[self.holds[slot]][1]


@settings(max_examples=200)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 30), st.booleans(), st.integers(0, 3),
       st.booleans())  # fmt: skip
def test_every_sequence_runs_to_its_end_in_any_memory_that_holds_one(
    lengths, slots, rows, more, chunked, patience, captured
):
    blocks = -(-max(map(sum, lengths)) // BLOCK) + more
    limits = MicroBatchLimits(
        3, 12, rows, patience, chunked=chunked, cache_blocks=blocks, block_tokens=BLOCK, row_buckets=captured
    )
    player = Player(lengths, slots, limits)
    assert player.tokens == [generated for _, generated, _ in lengths]
    assert player.scheduler.waiting == player.scheduler.occupied == 0
    assert player.scheduler.pool.free == blocks
    first = list(dict.fromkeys(player.order))
    assert first == list(range(len(lengths))), "in the order in which they came"
    assert len(player.order) == len(lengths) + len(player.preempted)


def test_memory_that_holds_all_of_every_row_preempts_none_and_changes_no_pass():
    lengths = [(7 + k % 3, 5 + k % 7, k % 2) for k in range(40)]
    longest = -(-max(map(sum, lengths)) // BLOCK)
    slots = Scheduler(8, MicroBatchLimits(2, 40, 8))
    slots.add(prompt for prompt, _, _ in lengths)
    tokens, holds, passes = [0] * len(lengths), {}, []
    ended = lambda slot: tokens[holds[slot]] >= lengths[holds[slot]][1]  # noqa: E731
    while slots.next_group() is not None:
        for batch in slots.schedule(ended):
            holds.update(zip(batch.slots, batch.sequences, strict=False))
            passes.append((batch.phase, batch.live, batch.sequences))
            for slot in batch.live:
                tokens[holds[slot]] += 1
    player = Player(lengths, 8, MicroBatchLimits(2, 40, 8, cache_blocks=8 * longest, block_tokens=BLOCK))
    assert [(batch.phase, batch.live, batch.sequences) for batch in player.passes] == passes
    assert not player.preempted


def test_scarce_memory_is_shared_by_the_decode_groups():
    """With memory for four rows of eight slots, both groups have two."""
    limits = MicroBatchLimits(1, 16, 4, cache_blocks=4 * (HORIZON_TOKENS + 8) // BLOCK, block_tokens=BLOCK)
    scheduler = Scheduler(8, limits)
    scheduler.add([8] * 8, (), [100] * 8)
    taken = [slot for batch in scheduler.schedule(lambda slot: False) for slot in batch.slots]
    assert sorted(taken) == [0, 1, 4, 5]


def test_a_shared_prefix_takes_no_blocks():
    lengths = [(20, 9, 0)] * 6
    limits = MicroBatchLimits(2, 40, 6, cache_blocks=6 * 4, block_tokens=BLOCK)
    player = Player(lengths, 6, limits, shared=16)
    assert player.tokens == [9] * 6
    assert not player.preempted


def test_more_rows_run_in_the_same_memory_and_in_less_time():
    class Times:
        stages = 1

        def work(self, stage, phase, rows, tokens, past):
            return 0.001 * rows * tokens if phase == "prefill" else 0.1

        def hop(self, stage, phase, rows, tokens):
            return 0.0

        def back(self, stage, rows):
            return 0.0

    lengths = [(8, 24 if k % 8 == 0 else 4) for k in range(64)]
    most, blocks = [64] * 64, 4 * 64 // BLOCK
    slots = simulate(Times(), lengths, 4, MicroBatchLimits(4, 64, 4, 0))
    limits = MicroBatchLimits(4, 64, 16, 0, cache_blocks=blocks, block_tokens=BLOCK)
    shared = simulate(Times(), lengths, 16, limits, (), most)
    assert shared.latency_seconds < 0.8 * slots.latency_seconds


def test_a_pool_says_what_does_not_fit():
    pool = BlockPool(2, 4, BLOCK)
    with pytest.raises(UserError, match="needs 17 positions of the KV cache, which has 16; plan for a larger"):
        pool.check(17)
    assert pool.has_room(16, 16)
    pool.admit(0, 9, 16)
    assert pool.tables[0] == [0, 1, 2]
    assert not pool.has_room(1, 1)  # the first may take all
    assert pool.extend(0, 7)
    assert not pool.extend(0)
    with pytest.raises(ValueError, match="1 tokens, but 0 of 4 blocks are free"):
        pool.admit(1, 1, 1)
    pool.release(0)
    assert pool.free == 4


def test_captured_passes_are_known_ahead_where_memory_allows():
    """All but those behind a prefill, whose prompt may end with a block."""
    lengths = [(6, 40, 0)] * 4
    limits = MicroBatchLimits(4, 40, 4, cache_blocks=4 * 12, block_tokens=BLOCK, row_buckets=True)
    assert Player(lengths, 4, limits).ahead == 39
