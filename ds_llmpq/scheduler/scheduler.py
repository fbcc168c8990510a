"""Which micro-batches a pipeline runs, in which order, as sequences end and others take their slots.

The order follows from the sequences' prompts and from when each ends, from nothing else: so every stage works it out
alone, and the simulation of a pipeline runs the very same micro-batches as the engine. Pure state, no clock.

Slots are cut into decode groups of `decode_rows`, visited in turn. A visit first frees the slots whose sequence has
ended, then admits waiting sequences to free slots (of any group) in prefill micro-batches, then lets the group's
running sequences decode together. A sequence joins its group's decode micro-batches once each group has been visited
since its prefill was scheduled; until then no stage waits for its first token.

Where sequences share the blocks of the KV cache (`limits.cache_blocks`), the group's running sequences first take the
block that the next token may need. If none is free, the group's youngest is preempted: it waits before all others, and
prefill computes its prompt and tokens again. Then sequences are admitted as far as memory goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from itertools import repeat
from typing import NamedTuple

from ds_llmpq.scheduler.block_pool import BlockPool
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits


class _Slot(Enum):
    FREE = 0
    CHUNKED = 3  # part of its prompt is computed
    PREFILLED = 1  # its first token is not waited for yet
    RUNNING = 2


class _Waiting(NamedTuple):
    """A sequence that has no slot: tokens to compute, those of a shared prefix before them, and how many it can come to
    behind the prefix."""

    number: int
    tokens: int
    shared: int
    most: int


class Scheduler:
    """The micro-batches over `slots` slots. Sequences are numbered as they are added. `pool`: who has which blocks of
    the KV cache; None: each slot has its own positions. `preempted`: (slot, number) of sequences that the last visit
    has sent back to wait."""

    def __init__(self, slots: int, limits: MicroBatchLimits):
        self.limits = limits
        starts = range(0, slots, limits.decode_rows)
        self.groups = [range(start, min(start + limits.decode_rows, slots)) for start in starts]
        self._state = [_Slot.FREE] * slots
        self._since = [0] * slots  # the visit at which a slot came into its state
        self.pool = BlockPool(slots, limits.cache_blocks, limits.block_tokens) if limits.cache_blocks else None
        self.preempted: list[tuple[int, int]] = []
        self._held: list[_Waiting | None] = [None] * slots  # each slot's sequence, as it was admitted
        self._waiting: deque[_Waiting] = deque()
        self._chunked: deque[tuple[int, int, int]] = deque()  # (slot, tokens computed, tokens left)
        self._added = 0
        self._count = 0
        self._visit = 0
        self._turn = len(self.groups) - 1  # the group visited last

    @property
    def waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self._waiting)

    @property
    def occupied(self) -> int:
        return sum(state is not _Slot.FREE for state in self._state)

    def add(
        self,
        prompt_tokens: Iterable[int],
        shared_tokens: Iterable[int] = (),
        most_tokens: Iterable[int] = (),
    ) -> None:
        """More sequences, to be admitted in this order. `shared_tokens`: how many of each prompt's are a prefix that is
        there already; (): none of any. `most_tokens`: how many each can come to with its answer; (): all there are."""
        everything = self.pool.blocks * self.pool.block_tokens if self.pool else 0
        for tokens, shared, most in zip(
            prompt_tokens, shared_tokens or repeat(0), most_tokens or repeat(everything), strict=False
        ):
            if self.pool:
                self.pool.check(max(tokens, most if most_tokens else 0) - shared)
            self._waiting.append(_Waiting(self._added, tokens - shared, shared, most - shared))
            self._added += 1

    def next_group(self) -> range | None:
        """The slots of the group whose visit is next; None when all is done."""
        index = self._next_index()
        return None if index is None else self.groups[index]

    def list_pending_slots(self) -> list[int]:
        """Slots whose last token must be known before the next visit can be scheduled."""
        index = self._next_index()
        return [] if index is None else [slot for slot in self.groups[index] if self._joins(slot, self._visit + 1)]

    def schedule(self, ended: Callable[[int], bool]) -> list[MicroBatch]:
        """Makes the next visit: the micro-batches it leads to. `ended(slot)`: whether the sequence there has its last
        token; asked only for the `list_pending_slots`."""
        joining = self.list_pending_slots()
        self._turn = self._next_index()
        self._visit += 1
        self.preempted = []
        for slot in joining:
            if ended(slot):
                self._free(slot)
            else:
                self._set_state(slot, _Slot.RUNNING)
        group = self.groups[self._turn]
        running = [slot for slot in group if self._state[slot] is _Slot.RUNNING]
        if self.pool:
            running = self._take_blocks(running)
        if self.limits.ragged:
            return self._fill_call(group, running)
        batches = [self._take_chunk(*self._chunked.popleft(), ())] if self._chunked else []
        if self._waiting and self._worth_admitting():
            batches += self._admit_waiting()
        if running:
            batches.append(self._decode(group, running))
        return batches

    def _fill_call(self, group: range, running: Sequence[int]) -> list[MicroBatch]:
        """One call: tokens of prompts, wherever they stand, and the group's running sequences."""
        batches, room = [], self.limits.count_prompt_tokens(len(running))
        if self._chunked:
            slot, past, left = self._chunked.popleft()
            batches.append(self._take_chunk(slot, past, left, (), room))
            room -= min(left, room)
        if self._waiting and self._worth_admitting():
            batches += self._admit_into(room)
        if running:
            batches.append(self._decode(group, running))
        return [replace(batch, joined=place > 0) for place, batch in enumerate(batches)]

    def _admit_into(self, room: int) -> Iterable[MicroBatch]:
        """Waiting sequences as far as `room` tokens go, the last of them in part."""
        free = deque(self._list_free())
        while room and free and self._has_room():
            taken, past = [], self._waiting[0].shared
            while free and self._has_room() and len(taken) < self.limits.prefill_rows:
                if self._waiting[0].shared != past or self._waiting[0].tokens > room:
                    break
                taken.append((free.popleft(), self._waiting[0].number))
                room -= self._waiting[0].tokens
                self._hold(taken[-1][0], self._waiting.popleft())
            if taken:
                yield self._prefill(taken, past)
            elif room:
                slot, entry = free.popleft(), self._waiting.popleft()
                self._hold(slot, entry)
                yield self._take_chunk(slot, past, entry.tokens, (entry.number,), room)
                room = 0

    def forecast(self, ends: Callable[[int], bool]) -> MicroBatch | None:
        """The decode micro-batch of the group visited last at its next visit, if none of its sequences end but those
        that `ends` names; None: there is none. Nothing changes: the visit may come to less."""
        group, visit = self.groups[self._turn], self._visit + self._count_round()
        running = [slot for slot in group if self._joins(slot, visit) and not ends(slot)]
        if not running or (self.pool and not all(map(self.pool.has_place, running))):
            return None
        return MicroBatch(0, "decode", tuple(self._choose_decode_slots(group, running)), tuple(running))

    def _next_index(self) -> int | None:
        count = len(self.groups)
        for step in range(1, count + 1):
            index = (self._turn + step) % count
            if any(self._state[slot] is not _Slot.FREE for slot in self.groups[index]):
                return index
        return (self._turn + 1) % count if self._waiting else None

    def _joins(self, slot: int, visit: int) -> bool:
        """Whether the slot takes part in the visit: it runs, or its prefill was scheduled a round ago."""
        if self._state[slot] is _Slot.PREFILLED:
            return visit - self._since[slot] >= self._count_round()
        return self._state[slot] is _Slot.RUNNING

    def _count_round(self) -> int:
        """Visits until each group with a sequence has had its turn."""
        return max(1, sum(any(self._state[slot] is not _Slot.FREE for slot in group) for group in self.groups))

    def _set_state(self, slot: int, state: _Slot) -> None:
        if self._state[slot] is not state:
            self._state[slot] = state
            self._since[slot] = self._visit

    def _free(self, slot: int) -> None:
        self._set_state(slot, _Slot.FREE)
        if self.pool:
            self.pool.release(slot)

    def _take_blocks(self, running: Sequence[int]) -> list[int]:
        """Gives each of the group's running sequences a place for its next token, the oldest first; those that are left
        when the youngest have made room, in ascending order."""
        by_age = sorted(running, key=lambda slot: self._held[slot].number)
        place = 0
        while place < len(by_age):
            if self.pool.extend(by_age[place]):
                place += 1
            else:
                self._preempt(by_age.pop())
        if self.limits.row_buckets:  # so that passes ahead of the host (`forecast`) know where their tokens go
            for slot in by_age:
                self.pool.reserve(slot)
        return sorted(by_age)

    def _preempt(self, slot: int) -> None:
        """What is stored is computed again, with the token that has come last."""
        held, tokens = self._held[slot], self.pool.stored(slot) + 1
        self.pool.check(tokens)
        self._waiting.appendleft(held._replace(tokens=tokens))
        self.preempted.append((slot, held.number))
        self._free(slot)

    def _worth_admitting(self) -> bool:
        free = [slot for slot, state in enumerate(self._state) if state is _Slot.FREE]
        if len(free) == len(self._state) or len(free) >= self.limits.prefill_rows:
            return True
        oldest = min((self._since[slot] for slot in free), default=self._visit)
        return bool(free) and self._visit - oldest >= self.limits.patience_rounds * self._count_round()

    def _admit_waiting(self) -> Iterable[MicroBatch]:
        free = deque(self._list_free())
        while free and self._has_room():
            taken, longest, past = [], 0, self._waiting[0].shared
            if self._is_long(self._waiting[0].tokens):
                slot, entry = free.popleft(), self._waiting.popleft()
                self._hold(slot, entry)
                yield self._take_chunk(slot, past, entry.tokens, (entry.number,))
                continue
            while free and self._has_room() and self._fits(len(taken) + 1, max(longest, self._waiting[0].tokens)):
                if self._waiting[0].shared != past:  # rows of a pass stand at the same positions
                    break
                slot, entry = free.popleft(), self._waiting.popleft()
                self._hold(slot, entry)
                longest = max(longest, entry.tokens)
                taken.append((slot, entry.number))
            yield self._prefill(taken, past)

    def _prefill(self, taken: list[tuple[int, int]], past: int) -> MicroBatch:
        """Of slots and the numbers of the sequences that have taken them."""
        taken.sort()
        slots = tuple(slot for slot, _ in taken)
        for slot in slots:
            self._set_state(slot, _Slot.PREFILLED)
        return self._build_micro_batch("prefill", slots, slots, tuple(number for _, number in taken), past)

    def _list_free(self) -> list[int]:
        """Free slots in the order in which they are taken. If memory ends before slots do, each group has its share."""
        free = [slot for slot, state in enumerate(self._state) if state is _Slot.FREE]
        if not self.pool:
            return free
        taken = [sum(self._state[slot] is not _Slot.FREE for slot in group) for group in self.groups]
        ranks = {}
        for slot in free:
            index = slot // self.limits.decode_rows
            ranks[slot] = taken[index]
            taken[index] += 1
        return sorted(free, key=lambda slot: (ranks[slot], slot))

    def _has_room(self) -> bool:
        """Whether the first of those that wait may be admitted to a free slot."""
        return bool(self._waiting) and (
            not self.pool or self.pool.has_room(self._waiting[0].tokens, self._waiting[0].most)
        )

    def _hold(self, slot: int, entry: _Waiting) -> None:
        self._held[slot] = entry
        if self.pool:
            self.pool.admit(slot, entry.tokens, entry.most)

    def _is_long(self, tokens: int) -> bool:
        return self.limits.chunked and tokens > self.limits.prefill_tokens

    def _take_chunk(
        self, slot: int, past: int, left: int, sequences: tuple[int, ...], most: int | None = None
    ) -> MicroBatch:
        """The next tokens of a long prompt, `most` at a time. Behind the last ones it is prefilled as any other."""
        tokens = min(left, most or self.limits.prefill_tokens)
        if left > tokens:
            self._chunked.appendleft((slot, past + tokens, left - tokens))
        self._set_state(slot, _Slot.CHUNKED if left > tokens else _Slot.PREFILLED)
        live = () if left > tokens else (slot,)
        return self._build_micro_batch("prefill", (slot,), live, sequences, past, tokens)

    def _fits(self, rows: int, longest: int) -> bool:
        most = 1 if self.limits.batch_invariant else self.limits.prefill_rows
        return rows == 1 or (rows <= most and rows * longest <= self.limits.prefill_tokens)

    def _decode(self, group: range, running: Sequence[int]) -> MicroBatch:
        return self._build_micro_batch("decode", tuple(self._choose_decode_slots(group, running)), tuple(running))

    def _choose_decode_slots(self, group: range, running: Sequence[int]) -> Sequence[int]:
        if self.pool or self.limits.ragged:
            return running
        if self.limits.batch_invariant:
            return group
        if self.limits.row_buckets:
            rows = running[-1] + 1 - group.start
            return group[: 1 << (rows - 1).bit_length()]
        return range(running[0], running[-1] + 1)

    def _build_micro_batch(
        self,
        phase: str,
        slots: tuple[int, ...],
        live: tuple[int, ...],
        sequences: tuple[int, ...] = (),
        past: int = 0,
        tokens: int = 0,
    ) -> MicroBatch:
        self._count += 1
        return MicroBatch(self._count, phase, slots, live, sequences, past, tokens)
