"""The order of micro-batches against what it promises, on random sequences."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.scheduler import Scheduler

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), max_size=25)
PADDED = st.builds(
    MicroBatchLimits, st.integers(1, 5), st.integers(1, 60), st.integers(1, 4), st.integers(0, 4), st.booleans(),
    st.booleans(),
)  # fmt: skip
RAGGED = st.builds(
    MicroBatchLimits, st.integers(1, 5), st.integers(1, 200), st.integers(1, 40), st.integers(0, 4),
    ragged=st.just(True),
)  # fmt: skip
LIMITS = PADDED | RAGGED


class Player:
    """Runs a scheduler to its end; a micro-batch's tokens are known at once. Notes what each visit leads to."""

    def __init__(self, lengths, slots, limits, added=None):
        self.scheduler, self.lengths = Scheduler(slots, limits), lengths
        self.holds, self.tokens = {}, Counter()
        self.visits = []
        for start, stop in added or [(0, len(lengths))]:
            self.scheduler.add(prompt for prompt, _ in lengths[start:stop])
            most_waiting = 0 if stop == len(lengths) else self.scheduler.waiting // 2
            while self.scheduler.next_group() is not None and (
                stop == len(lengths) or self.scheduler.waiting > most_waiting
            ):
                self.visit()

    def visit(self):
        group, pending = self.scheduler.next_group(), self.scheduler.list_pending_slots()
        assert set(pending) <= set(group)
        ended = [slot for slot in pending if self.ended(slot)]
        passes = self.scheduler.schedule(self.ended)
        for slot in ended:
            if slot not in {s for batch in passes for s in batch.slots if batch.phase == "prefill"}:
                del self.holds[slot]
        for batch in passes:
            if batch.phase == "prefill":
                assert batch.live == batch.slots or (batch.tokens and not batch.live), "a chunk has no token"
                assert len(batch.sequences) == len(batch.slots) or (batch.tokens and not batch.sequences)
                for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
                    assert slot not in self.holds or slot in ended
                    self.holds[slot] = sequence
            for slot in batch.live:
                self.tokens[self.holds[slot]] += 1
        self.visits.append((group, passes))
        assert len(self.visits) < 5000

    def ended(self, slot):
        return self.tokens[self.holds[slot]] >= self.lengths[self.holds[slot]][1]

    def passes(self, phase):
        return [batch for _, passes in self.visits for batch in passes if batch.phase == phase]


@given(LENGTHS, st.integers(1, 9), LIMITS, st.integers(0, 25))
def test_every_sequence_is_admitted_once_in_order_and_runs_to_its_end(lengths, slots, limits, cut):
    cut = min(cut, len(lengths))
    player = Player(lengths, slots, limits, [(0, cut), (cut, len(lengths))])
    assert [number for batch in player.passes("prefill") for number in batch.sequences] == list(range(len(lengths)))
    assert [player.tokens[number] for number in range(len(lengths))] == [generated for _, generated in lengths]
    assert player.scheduler.waiting == player.scheduler.occupied == 0
    numbers = [batch.number for _, passes in player.visits for batch in passes]
    assert numbers == list(range(1, len(numbers) + 1))


@given(LENGTHS, st.integers(1, 9), PADDED)
def test_passes_keep_their_bounds(lengths, slots, limits):
    player = Player(lengths, slots, limits)
    for batch in player.passes("prefill"):
        longest = max(lengths[number][0] for number in batch.sequences)
        assert batch.size == 1 or (batch.size <= limits.prefill_rows and batch.size * longest <= limits.prefill_tokens)
        assert batch.size == 1 or not limits.batch_invariant
    for group, passes in player.visits:
        decode = [batch for batch in passes if batch.phase == "decode"]
        assert len(decode) <= 1
        for batch in decode:
            assert set(batch.live) <= set(batch.slots) <= set(group)
            assert batch.slots == tuple(range(batch.slots[0], batch.slots[-1] + 1)), "a slice of the cache"
            if limits.batch_invariant:
                assert batch.slots == tuple(group)
            elif limits.row_buckets:
                assert batch.slots[0] == group.start
                assert batch.size == len(group) or batch.size.bit_count() == 1
                assert batch.size == 1 or batch.slots[batch.size // 2] <= batch.live[-1], "the least that holds all"
            else:
                assert {batch.slots[0], batch.slots[-1]} <= set(batch.live)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 8), st.booleans()), max_size=20), st.integers(1, 40), RAGGED
)
def test_a_call_of_a_graph_is_filled_to_its_bound(lengths, slots, limits):
    """Tokens of each prompt once and in order, behind a shared prefix or not; a call with prompts left is full."""
    shared = [tokens // 2 * has for tokens, _, has in lengths]
    scheduler, left = Scheduler(slots, limits), [generated for _, generated, _ in lengths]
    scheduler.add((tokens for tokens, *_ in lengths), shared)
    computed, holds = list(shared), {}

    def ended(slot):
        return left[holds[slot]] <= 0

    while (group := scheduler.next_group()) is not None:
        batches = scheduler.schedule(ended)
        decode = [batch for batch in batches if batch.phase == "decode"]
        rows = sum(batch.size for batch in decode)
        assert all(batch.slots == batch.live and set(batch.slots) <= set(group) for batch in decode)
        assert [batch.joined for batch in batches] == [place > 0 for place in range(len(batches))]
        tokens = 0
        for batch in batches:
            holds |= zip(batch.slots, batch.sequences, strict=False)
            if batch.phase == "prefill":
                assert batch.size <= limits.prefill_rows
                for slot in batch.slots:
                    own = batch.tokens or lengths[holds[slot]][0] - batch.past
                    assert batch.past == computed[holds[slot]]
                    computed[holds[slot]] += own
                    tokens += own
                    assert (slot in batch.live) == (computed[holds[slot]] == lengths[holds[slot]][0])
            for slot in batch.live:
                left[holds[slot]] -= 1
        assert tokens <= limits.count_prompt_tokens(rows)
        if scheduler.waiting and scheduler.occupied < slots and not limits.patience_rounds:
            assert tokens == limits.count_prompt_tokens(rows), "or more would have been admitted"
    assert (computed, left) == ([tokens for tokens, *_ in lengths], [0] * len(left))


def test_calls_with_decode_rows_have_64_tokens_or_a_multiple():
    limits = MicroBatchLimits(4, 512, 8, ragged=True)
    assert [limits.count_prompt_tokens(rows) for rows in (0, 1, 8, 32, 33, 96, 97)] == [128, 63, 56, 32, 95, 32, 95]
    assert replace(limits, prefill_tokens=50).count_prompt_tokens(8) == 50


@given(LENGTHS, st.integers(1, 9), PADDED)
def test_no_slot_stays_free_for_long_while_sequences_wait(lengths, slots, limits):
    """From a slot's becoming free to its next prefill: at most so many visits of each group, and one that frees it."""
    scheduler, tokens = Scheduler(slots, limits), Counter()
    scheduler.add(prompt for prompt, _ in lengths)
    holds, free_since, visit = {}, dict.fromkeys(range(slots), 0), 0
    while scheduler.next_group() is not None:
        visit += 1
        ended = [slot for slot in scheduler.list_pending_slots() if tokens[holds[slot]] >= lengths[holds[slot]][1]]
        passes = scheduler.schedule(ended.__contains__)
        free_since |= dict.fromkeys(ended, visit)
        for batch in passes:
            for slot, sequence in zip(batch.slots, batch.sequences, strict=False):
                holds[slot] = sequence
                free_since.pop(slot)
            tokens.update(holds[slot] for slot in batch.live)
        if scheduler.waiting:
            for since in free_since.values():
                assert visit - since <= limits.patience_rounds * len(scheduler.groups)


@given(LENGTHS, st.integers(1, 9), LIMITS)
def test_a_group_s_next_decode_pass_can_be_foreseen(lengths, slots, limits):
    """With one decode group it is the very pass if the ends are known, and has all its rows if they are not."""
    player = Player([], slots, replace(limits, decode_rows=slots))
    player.lengths = lengths
    player.scheduler.add(prompt for prompt, _ in lengths)
    known = unknown = None
    while player.scheduler.next_group() is not None:
        player.visit()
        decode = [batch for batch in player.visits[-1][1] if batch.phase == "decode"]
        if known is not None or unknown is not None:
            assert [(batch.slots, batch.live) for batch in decode] == ([(known.slots, known.live)] if known else [])
        if decode:
            assert set(decode[0].live) <= set(unknown.live)
        known = player.scheduler.forecast(player.ended)
        unknown = player.scheduler.forecast(lambda slot: False)


def test_a_sequence_joins_its_group_a_round_after_its_prefill():
    """Three groups of one slot. The slot of group 0 is refilled at its visit; groups 1 and 2 have their passes before
    anybody waits for its first token."""
    player = Player([(1, 2), (1, 9), (1, 9), (1, 9)], 3, MicroBatchLimits(3, 3, 1, patience_rounds=0))
    seen = [[(batch.phase, batch.slots) for batch in passes] for _, passes in player.visits]
    refill = next(i for i, passes in enumerate(seen) if ("prefill", (0,)) in passes and i > 0)
    assert seen[refill : refill + 4] == [
        [("prefill", (0,))], [("decode", (1,))], [("decode", (2,))], [("decode", (0,))]
    ]  # fmt: skip
