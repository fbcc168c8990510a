"""A stream on one stage: request groups of one shape, one joining another, and the state that decides which micro-batch
comes next."""

from __future__ import annotations

import time
from array import array
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace

from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits
from ds_llmpq.scheduler.prefix import count_shared
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.scheduler import Scheduler
from ds_llmpq.scheduler.slot_table import Finish, SlotTable

TakeGroup = Callable[[], RequestGroup | None]
OnFinished = Callable[[Sequence, list[int], Finish], None]
OnTokens = Callable[[list[int], list[int]], None]  # keys of sequences that go on, and the next token of each


class SequenceLengths(abc.Sequence):
    """(prompt tokens, generated tokens) of each sequence; `shared`, how many of its prompt's tokens were not computed;
    and `most`, how many it might have come to. Sixteen bytes each, for there may be millions."""

    def __init__(self) -> None:
        self._prompt, self._generated, self.shared, self.most = (array("i") for _ in range(4))

    def __len__(self) -> int:
        return len(self._prompt)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._prompt[index], self._generated[index]

    def admit(self, prompt_tokens: int, shared: int, most: int) -> int:
        """A sequence is admitted; its index."""
        self._prompt.append(prompt_tokens)
        self._generated.append(0)
        self.shared.append(shared)
        self.most.append(most)
        return len(self._prompt) - 1

    def end(self, index: int, generated_tokens: int) -> None:
        self._generated[index] = generated_tokens


@dataclass(frozen=True)
class StreamTimes:
    """A stream as this rank saw it: from its first group's arrival until the last token of all joined groups is known.

    `lengths`: prompt tokens and generated tokens of every sequence, in the order of admission. `first_token_seconds`:
    until the first token of any of them was known. `of_prefix`: its one sequence was a prefix that others share.
    `recomputed`: tokens of each time that a sequence was admitted again, because it had been preempted.
    """

    slots: int
    seconds: float
    first_token_seconds: float
    lengths: SequenceLengths
    of_prefix: bool = False
    recomputed: tuple[int, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt for prompt, _ in self.lengths)

    @property
    def shared_tokens(self) -> int:
        """Those of the prompts that were not computed."""
        return sum(self.lengths.shared)

    @property
    def generated_tokens(self) -> int:
        return sum(generated for _, generated in self.lengths)


class Stream:
    """`poll` records tokens that have come meanwhile; `on_admitted(slot, sequence)` is called when a sequence takes a
    slot, `on_tokens(keys, tokens)` when tokens are known of sequences that go on.

    `prefix`: tokens whose keys and values the cache holds; sequences that begin with them compute and store the rest.
    `held_back`: a group that was taken but does not join. `nan_slots`: slots whose cache may hold NaN; `nan_blocks`:
    blocks that may, where sequences share them.
    """

    def __init__(
        self,
        first: RequestGroup,
        limits: MicroBatchLimits,
        take_group: TakeGroup,
        on_finished: OnFinished,
        poll: Callable[[], None],
        on_admitted: Callable[[int, Sequence], None],
        on_tokens: OnTokens | None = None,
        prefix: tuple[int, ...] = (),
    ):
        self.shape = first.shape
        self.prefix = prefix
        self.batch_invariant = limits.batch_invariant
        self.ragged = limits.ragged
        self.scheduler = Scheduler(first.slots, limits)
        self.slots = SlotTable(first.slots)
        self.held_back: RequestGroup | None = None
        self.nan_slots: set[int] = set()
        self.nan_blocks: set[int] = set()
        self._take_group = take_group
        self._on_finished = on_finished
        self._poll = poll
        self._on_admitted = on_admitted
        self._on_tokens = on_tokens
        self._no_more = False
        self._live = first.live
        self._asked = False  # since the last decision
        self._waiting: dict[int, Sequence] = {}  # by the scheduler's numbers
        self._added = 0
        self._index = [0] * first.slots  # of a slot's sequence in `_lengths`
        self._preempted: dict[int, int] = {}  # numbers of those that wait again, and their index
        self._recomputed: list[int] = []
        self._lengths = SequenceLengths()
        self._started, self._ended = time.perf_counter(), 0.0
        self._first_token = 0.0
        self._add(first)

    def wants_requests(self) -> bool:
        """Whether a request group must be taken before the next micro-batches are scheduled."""
        if self._no_more:
            return False
        if self._live:
            return not self._asked and self.scheduler.waiting == 0 and self.scheduler.occupied < self.shape[0]
        # enough to fill every slot, so that a group is asked for once in so many requests and none waits for it
        return self.scheduler.waiting < self.shape[0]

    def take_requests(self) -> None:
        group, self._asked = self._take_group(), True
        if group is not None and group.joins and group.shape == self.shape:
            self._add(group)
        else:
            self.held_back, self._no_more = group, True

    def list_pending_slots(self) -> list[int] | None:
        """Slots whose tokens must be known before the next micro-batches are scheduled; None when all is done."""
        return None if self.scheduler.next_group() is None else self.scheduler.list_pending_slots()

    def has_tokens(self, slots: list[int]) -> bool:
        """Whether the tokens of these slots are known by now, without waiting."""
        self._poll()
        return not self.slots.are_awaited(slots)

    def schedule(self) -> list[MicroBatch]:
        """The next micro-batches; possibly none."""
        batches, self._asked = self.scheduler.schedule(self.slots.has_ended), False
        for slot, number in self.scheduler.preempted:
            self._waiting[number] = replace(self.slots.sequences[slot], generated=tuple(self.slots.generated[slot]))
            self._preempted[number] = self._index[slot]
        for batch in batches:
            for slot, number in zip(batch.slots, batch.sequences, strict=False):
                self._admit(slot, number, batch.past)
            self.slots.start(batch)
        return batches

    def record(self, batch: MicroBatch, tokens: abc.Sequence[int], finish: abc.Sequence[int]) -> None:
        """Takes the tokens of a micro-batch."""
        self._ended = time.perf_counter()
        self._first_token = self._first_token or self._ended
        ended = self.slots.record(batch, tokens, finish)
        sequences, generated, found = self.slots.sequences, self.slots.generated, self.slots.finish
        if self._on_tokens is not None:
            going = [slot for slot in batch.live if found[slot] in (Finish.RUNNING, Finish.PREEMPTED)]
            self._on_tokens([sequences[slot].key for slot in going], [generated[slot][-1] for slot in going])
        for slot in ended:
            if found[slot] is Finish.NAN_LOGITS:
                if self.scheduler.pool:
                    self.nan_blocks.update(self.scheduler.pool.tables[slot])
                else:
                    self.nan_slots.add(slot)
            index = self._index[slot]
            length = len(sequences[slot].prompt) + len(generated[slot])
            self._lengths.end(index, length - self._lengths[index][0])
            self._on_finished(sequences[slot], generated[slot], found[slot])

    def times(self) -> StreamTimes:
        """To be asked when the stream has ended."""
        return StreamTimes(
            slots=self.shape[0],
            seconds=self._ended - self._started,
            first_token_seconds=self._first_token - self._started,
            lengths=self._lengths,
            recomputed=tuple(self._recomputed),
        )

    def _add(self, group: RequestGroup) -> None:
        self._waiting |= enumerate(group.sequences, self._added)
        self._added += len(group.sequences)
        prompts = [sequence.prefill_tokens for sequence in group.sequences]
        self.scheduler.add(
            map(len, prompts),
            [count_shared(prompt, self.prefix) for prompt in prompts],
            [sequence.max_kv_tokens for sequence in group.sequences],
        )

    def _admit(self, slot: int, number: int, shared: int) -> None:
        sequence = self._waiting.pop(number)
        self.slots.admit(slot, sequence, shared)
        if number in self._preempted:
            self._index[slot] = self._preempted.pop(number)
            self._recomputed.append(len(sequence.prefill_tokens) - shared)
        else:
            self._index[slot] = self._lengths.admit(len(sequence.prefill_tokens), shared, sequence.max_kv_tokens)
        self._on_admitted(slot, sequence)
