"""Hands requests to the engine as waves: which share a cache shape, in which order, and again if they overran.

Admission reserves cache positions for a request's prompt and for a bound on its answer: its own limit (`worst_case`),
or a predicted quantile. An answer that outgrows a predicted bound leaves its slot and is admitted again, with its
tokens so far as part of the prompt and room for the worst case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.engine.sampling import RowSampling
from ds_llmpq.engine.wave import Wave, WaveRow
from ds_llmpq.quant.kernels import rounded_up

Row = int | WaveRow  # a request by its index, or one that has generated tokens already
_LEAST_ROWS = 32  # a wave that joins: asking the driver costs each stage a message


class Feed:
    """Waves of `prepared`, in order. `bounds`: tokens of each answer that are reserved.

    `sequences` and `row_positions` are what the plan has room for: so many sequences of so many tokens. A longer one
    runs in a shape of fewer, longer slots, doubled until it fits. With `refill`, waves of one shape join; without it,
    a wave is as many requests as fit together, and takes as much of the cache as its longest needs. `multiple`: slots
    come in multiples of so many, if they are as many. `block`: a slot takes whole blocks of so many positions. `begun`:
    tokens that requests have generated already, by index; they are admitted with those, and room for the worst case.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedRequest],
        bounds: Sequence[int],
        sequences: int,
        row_positions: int,
        refill: bool,
        multiple: int = 1,
        block: int = 1,
        begun: Mapping[int, Sequence[int]] | None = None,
    ):
        self.prepared = prepared
        self.sequences = sequences
        self.row_positions = row_positions
        self.positions = sequences * row_positions
        self.multiple = multiple
        self.block = block
        self.requeued = 0
        self.stopped = False
        self._refill = refill
        self._again: deque[WaveRow] = deque()
        self._begun = begun or {}
        self._needs = [
            rounded_up(each.prompt_tokens + (each.max_tokens if index in self._begun else bound), block)
            for index, (each, bound) in enumerate(zip(prepared, bounds, strict=True))
        ]
        self._waves = self._cut(range(len(prepared)), self._needs)

    def take(self) -> Wave | None:
        """The next wave; None: none for now. Requeued requests come when all others have been handed out."""
        if self.stopped:
            return None
        wave = next(self._waves, None)
        if wave is None and self._again:
            rows = sorted(self._again, key=lambda row: -row.positions)
            self._again.clear()
            self._waves = self._cut(rows, [rounded_up(row.positions, self.block) for row in rows])
            wave = next(self._waves)
        return wave

    def requeue(self, row: WaveRow, generated: Sequence[int]) -> None:
        """A request that has outgrown its slot, with its tokens so far."""
        self.requeued += 1
        self._again.append(replace(row, generated=tuple(generated)))

    def stop(self) -> None:
        """Hands out no more: what runs or waits on the stages still ends."""
        self.stopped = True

    def shape_of(self, need: int) -> tuple[int, int]:
        """(slots, capacity) for sequences of `need` positions."""
        capacity = self.row_positions
        while capacity < need:
            capacity *= 2
        capacity = min(capacity, self.positions)
        slots = self.positions // capacity
        return (slots - slots % self.multiple if slots > self.multiple else slots), capacity

    def streams(self, order: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(slots, requests by their index) of each stream, were they to run in this order."""
        needs = [self._needs[index] for index in order]
        if self._refill:
            for (slots, _), members in self._by_shape(order, needs):
                yield slots, members
        else:
            for start, stop in wave_spans(needs, self.sequences, self.positions):
                yield stop - start, list(order[start:stop])

    def _cut(self, rows: Sequence[Row], needs: Sequence[int]) -> Iterator[Wave]:
        return self._shaped(rows, needs) if self._refill else self._packed(rows, needs)

    def _shaped(self, rows: Sequence[Row], needs: Sequence[int]) -> Iterator[Wave]:
        for shape, members in self._by_shape(rows, needs):
            size = max(shape[0], _LEAST_ROWS)
            for start in range(0, len(members), size):
                part = tuple(map(self._row, members[start : start + size]))
                yield Wave(part, *shape, joins=True)

    def _by_shape(self, rows: Sequence[Row], needs: Sequence[int]) -> list[tuple[tuple[int, int], list[Row]]]:
        """Those of the longest slots first; in each shape the given order."""
        by_shape: dict[tuple[int, int], list[Row]] = {}
        for row, need in zip(rows, needs, strict=True):
            by_shape.setdefault(self.shape_of(need), []).append(row)
        return sorted(by_shape.items(), key=lambda entry: -entry[0][1])

    def _packed(self, rows: Sequence[Row], needs: Sequence[int]) -> Iterator[Wave]:
        for start, stop in wave_spans(needs, self.sequences, self.positions):
            yield Wave(tuple(map(self._row, rows[start:stop])), stop - start, max(needs[start:stop]))

    def _row(self, row: Row) -> WaveRow:
        return row if isinstance(row, WaveRow) else wave_row(row, self.prepared[row], self._begun.get(row, ()))


def wave_row(key: int, prepared: PreparedRequest, generated: Sequence[int] = ()) -> WaveRow:
    """A request as the engine sees it, with what it has generated already."""
    params = prepared.request.params
    return WaveRow(
        key=key,
        prompt=tuple(prepared.prompt_ids),
        max_tokens=prepared.max_tokens,
        sampling=RowSampling(
            params.temperature,
            params.top_p,
            params.top_k,
            params.seed,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.min_tokens,
        ),
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        generated=tuple(generated),
    )


def wave_spans(needs: Sequence[int], sequences: int, positions: int) -> Iterator[tuple[int, int]]:
    """Cuts requests, in order, into [start, stop): at most `sequences` of them that fit `positions` together, each
    taking as many as the longest of its wave."""
    start, longest = 0, 0
    for index, need in enumerate(needs):
        longest = max(longest, need)
        size = index - start + 1
        if size > sequences or size * longest > positions:
            yield start, index
            start, longest = index, need
    if start < len(needs):
        yield start, len(needs)
