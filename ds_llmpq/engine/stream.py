"""A stream on one stage: waves of one shape, one joining another, and the state that decides which pass comes next."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_llmpq.engine.sequences import Finish, Sequences
from ds_llmpq.engine.wave import Wave, WaveRow
from ds_llmpq.scheduler.scheduler import Pass, PassOrder, PassSizes

TakeWave = Callable[[], Wave | None]
OnFinished = Callable[[WaveRow, list[int], Finish], None]
OnTokens = Callable[[list[int], list[int]], None]  # keys of rows that go on, and the next token of each


class Lengths(Sequence):
    """(prompt tokens, generated tokens) of each sequence; eight bytes each, for there may be millions."""

    def __init__(self) -> None:
        self._prompt, self._generated = array("i"), array("i")

    def __len__(self) -> int:
        return len(self._prompt)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._prompt[index], self._generated[index]

    def admit(self, prompt_tokens: int) -> int:
        """A sequence is admitted; its index."""
        self._prompt.append(prompt_tokens)
        self._generated.append(0)
        return len(self._prompt) - 1

    def end(self, index: int, generated_tokens: int) -> None:
        self._generated[index] = generated_tokens


@dataclass(frozen=True)
class StreamTimes:
    """A stream as this rank saw it: from its first wave's arrival until the last token of all joined waves is known.

    `lengths`: prompt tokens and generated tokens of every sequence, in the order of admission. `first_token_seconds`:
    until the first token of any of them was known.
    """

    slots: int
    seconds: float
    first_token_seconds: float
    lengths: Lengths

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt for prompt, _ in self.lengths)

    @property
    def generated_tokens(self) -> int:
        return sum(generated for _, generated in self.lengths)


class Stream:
    """Implements the schedule's `Decisions`. `poll` records tokens that have come meanwhile; `on_admitted(slot, row)`
    is called when a request takes a slot, `on_tokens(keys, tokens)` when tokens are known of rows that go on.

    `held_back`: a wave that was taken but does not join. `broken`: slots whose cache may hold what is no number.
    """

    def __init__(
        self,
        first: Wave,
        sizes: PassSizes,
        following: TakeWave,
        on_finished: OnFinished,
        poll: Callable[[], None],
        on_admitted: Callable[[int, WaveRow], None],
        on_tokens: OnTokens | None = None,
    ):
        self.shape = first.shape
        self.fixed = sizes.fixed
        self.order = PassOrder(first.slots, sizes)
        self.sequences = Sequences(first.slots)
        self.held_back: Wave | None = None
        self.broken: set[int] = set()
        self._following = following
        self._on_finished = on_finished
        self._poll = poll
        self._on_admitted = on_admitted
        self._on_tokens = on_tokens
        self._no_more = False
        self._live = first.live
        self._asked = False  # since the last decision
        self._waiting: deque[WaveRow] = deque()
        self._place = [0] * first.slots  # of a slot's sequence in `_lengths`
        self._lengths = Lengths()
        self._started, self._ended = time.perf_counter(), 0.0
        self._first_token = 0.0
        self._add(first)

    def wants_requests(self) -> bool:
        if self._no_more:
            return False
        if self._live:
            return not self._asked and self.order.waiting == 0 and self.order.occupied < self.shape[0]
        # enough to fill every slot, so that a wave is asked for once in so many requests and none waits for it
        return self.order.waiting < self.shape[0]

    def take_requests(self) -> None:
        wave, self._asked = self._following(), True
        if wave is not None and wave.joins and wave.shape == self.shape:
            self._add(wave)
        else:
            self.held_back, self._no_more = wave, True

    def needed(self) -> list[int] | None:
        return None if self.order.upcoming() is None else self.order.needed()

    def known(self, slots: list[int]) -> bool:
        self._poll()
        return not self.sequences.awaited(slots)

    def decide(self) -> list[Pass]:
        passes, self._asked = self.order.decide(self.sequences.ended), False
        for batch in passes:
            if batch.phase == "prefill":
                for slot in batch.slots:
                    self._admit(slot, self._waiting.popleft())
            self.sequences.started(batch)
        return passes

    def record(self, batch: Pass, tokens: Sequence[int], finish: Sequence[int]) -> None:
        """Takes the tokens of a pass."""
        self._ended = time.perf_counter()
        self._first_token = self._first_token or self._ended
        ended = self.sequences.record(batch, tokens, finish)
        if self._on_tokens is not None:
            going = [slot for slot in batch.live if self.sequences.finish[slot] in (Finish.RUNNING, Finish.OVERRUN)]
            rows, generated = self.sequences.rows, self.sequences.generated
            self._on_tokens([rows[slot].key for slot in going], [generated[slot][-1] for slot in going])
        for slot in ended:
            if self.sequences.finish[slot] is Finish.BROKEN:
                self.broken.add(slot)
            row, generated = self.sequences.rows[slot], self.sequences.generated[slot]
            self._lengths.end(self._place[slot], len(generated) - len(row.generated))
            self._on_finished(row, generated, self.sequences.finish[slot])

    def times(self) -> StreamTimes:
        """To be asked when the stream has ended."""
        return StreamTimes(
            slots=self.shape[0],
            seconds=self._ended - self._started,
            first_token_seconds=self._first_token - self._started,
            lengths=self._lengths,
        )

    def _add(self, wave: Wave) -> None:
        self._waiting.extend(wave.rows)
        self.order.add(len(row.known) for row in wave.rows)

    def _admit(self, slot: int, row: WaveRow) -> None:
        self.sequences.place(slot, row)
        self._place[slot] = self._lengths.admit(len(row.known))
        self._on_admitted(slot, row)
