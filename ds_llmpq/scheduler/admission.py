"""Hands requests to the engine in groups: which share a cache shape, in which order, and again if they were preempted.

Admission reserves cache positions for a request's prompt and for a bound on its answer: its own limit (`worst_case`),
or a predicted quantile. An answer that outgrows a predicted bound leaves its slot and is admitted again, with its
tokens so far as part of the prompt and room for the worst case.
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from ds_llmpq.integers import round_up
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence

Row = int | Sequence  # a request by its index, or one that has been preempted
_LEAST_ROWS = 32  # a group that joins: asking the driver costs each stage a message


class Admissible(Protocol):
    """A request that waits. Its sequence is made when it is handed out: a million of them would not fit in memory."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def sequence(self, key: int, generated: abc.Sequence[int] = ()) -> Sequence:
        """What the engine runs, with what it has generated already."""


class AdmissionQueue:
    """Groups of `prepared`, in order. `bounds`: tokens of each answer that are reserved.

    `sequences` and `row_positions` are what the plan has room for: so many sequences of so many tokens. A longer one
    runs in a shape of fewer, longer slots, doubled until it fits. With `refill`, groups of one shape join; without it,
    a group is as many requests as fit together, and takes as much of the cache as its longest needs. `multiple`: slots
    come in multiples of so many, if they are as many. `block`: a slot takes whole blocks of so many positions. `begun`:
    tokens that requests have generated already, by index; they are admitted with those, and room for the worst case.
    `positions`: of all slots together; None: as many as that is. `shared`: tokens of each prompt that are a prefix held
    apart from the slots; (): of none. `paged`: requests share all positions, so that one shape has room for each.
    """

    def __init__(
        self,
        prepared: abc.Sequence[Admissible],
        bounds: abc.Sequence[int],
        sequences: int,
        row_positions: int,
        refill: bool,
        multiple: int = 1,
        block: int = 1,
        begun: Mapping[int, abc.Sequence[int]] | None = None,
        positions: int | None = None,
        shared: abc.Sequence[int] = (),
        paged: bool = False,
    ):
        self.prepared = prepared
        self.sequences = sequences
        self.row_positions = row_positions
        self.positions = sequences * row_positions if positions is None else positions
        self.multiple = multiple
        self.block = block
        self.requeued = 0
        self.stopped = False
        self._refill = refill
        self._paged = paged
        self._preempted: deque[Sequence] = deque()
        self._begun = begun or {}
        self._shared = shared or [0] * len(prepared)
        self._needs = [
            self._count_own(index, each.prompt_tokens + (each.max_tokens if index in self._begun else bound))
            for index, (each, bound) in enumerate(zip(prepared, bounds, strict=True))
        ]
        self._groups = self._cut(range(len(prepared)), self._needs)

    def take(self) -> RequestGroup | None:
        """The next group; None: none for now. Preempted requests come when all others have been handed out."""
        if self.stopped:
            return None
        group = next(self._groups, None)
        if group is None and self._preempted:
            rows = sorted(self._preempted, key=lambda row: -row.max_kv_tokens)
            self._preempted.clear()
            self._groups = self._cut(rows, [self._count_own(row.key, row.max_kv_tokens) for row in rows])
            group = next(self._groups)
        return group

    def requeue(self, row: Sequence, generated: abc.Sequence[int]) -> None:
        """A request that has outgrown its slot, with its tokens so far."""
        self.requeued += 1
        self._preempted.append(replace(row, generated=tuple(generated)))

    def stop(self) -> None:
        """Hands out no more: what runs or waits on the stages still ends."""
        self.stopped = True

    def choose_replay_shape(self) -> tuple[int, int]:
        """(slots, capacity) that every request fits."""
        needs = (
            self._count_own(index, each.prompt_tokens + each.max_tokens) for index, each in enumerate(self.prepared)
        )
        return self.choose_shape(max(needs, default=1))

    def choose_shape(self, need: int) -> tuple[int, int]:
        """(slots, capacity) for sequences of `need` positions."""
        if self._paged:
            return self.sequences, self.positions
        capacity = self.row_positions
        while capacity < need:
            capacity *= 2
        capacity = min(capacity, self.positions)
        slots = min(self.sequences, self.positions // capacity)
        return (slots - slots % self.multiple if slots > self.multiple else slots), capacity

    def streams(self, order: abc.Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(slots, requests by their index) of each stream, were they to run in this order."""
        needs = [self._needs[index] for index in order]
        if self._refill:
            for (slots, _), members in self._group_by_shape(order, needs):
                yield slots, members
        else:
            for start, stop in cut_spans(needs, self.sequences, self.positions):
                yield stop - start, list(order[start:stop])

    def _count_own(self, index: int, tokens: int) -> int:
        """Positions that a request of so many tokens takes in a slot."""
        return round_up(tokens - self._shared[index], self.block)

    def _cut(self, rows: abc.Sequence[Row], needs: abc.Sequence[int]) -> Iterator[RequestGroup]:
        return self._cut_by_shape(rows, needs) if self._refill else self._cut_to_fit(rows, needs)

    def _cut_by_shape(self, rows: abc.Sequence[Row], needs: abc.Sequence[int]) -> Iterator[RequestGroup]:
        for shape, members in self._group_by_shape(rows, needs):
            size = max(shape[0], _LEAST_ROWS)
            for start in range(0, len(members), size):
                part = tuple(map(self._make_sequence, members[start : start + size]))
                yield RequestGroup(part, *shape, joins=True)

    def _group_by_shape(
        self, rows: abc.Sequence[Row], needs: abc.Sequence[int]
    ) -> list[tuple[tuple[int, int], list[Row]]]:
        """Those of the longest slots first; in each shape the given order."""
        by_shape: dict[tuple[int, int], list[Row]] = {}
        for row, need in zip(rows, needs, strict=True):
            by_shape.setdefault(self.choose_shape(need), []).append(row)
        return sorted(by_shape.items(), key=lambda entry: -entry[0][1])

    def _cut_to_fit(self, rows: abc.Sequence[Row], needs: abc.Sequence[int]) -> Iterator[RequestGroup]:
        for start, stop in cut_spans(needs, self.sequences, self.positions):
            yield RequestGroup(tuple(map(self._make_sequence, rows[start:stop])), stop - start, max(needs[start:stop]))

    def _make_sequence(self, row: Row) -> Sequence:
        if isinstance(row, Sequence):
            return row
        return self.prepared[row].sequence(row, self._begun.get(row, ()))


def cut_spans(needs: abc.Sequence[int], sequences: int, positions: int) -> Iterator[tuple[int, int]]:
    """Cuts requests, in order, into [start, stop): at most `sequences` of them that fit `positions` together, each
    taking as many as the longest of its group."""
    start, longest = 0, 0
    for index, need in enumerate(needs):
        longest = max(longest, need)
        size = index - start + 1
        if size > sequences or size * longest > positions:
            yield start, index
            start, longest = index, need
    if start < len(needs):
        yield start, len(needs)
