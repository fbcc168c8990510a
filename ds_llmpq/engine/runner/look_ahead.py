"""One decode pass ahead of the host, where one stage holds all layers.

A pass takes its tokens from the device, where the pass before it has left them, so it can be launched before the host
has read those: the host reads tokens, asks the stop rule and schedules while the device works. The scheduler knows
nothing of it. What is launched is the micro-batch that it would come to if sequences ended by their lengths alone; when
it comes to its own, a row that has ended otherwise was computed once too often, and is dropped. Such a row has written
one more token into its slot, where the next sequence there writes before it reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_llmpq.engine.runner.host_copies import HostCopy, to_device
from ds_llmpq.engine.stage_run.faults import describe_error
from ds_llmpq.engine.stage_run.stage_runner import StageRunner
from ds_llmpq.engine.step_builder import StepBuilder
from ds_llmpq.engine.token_chooser import TokenChooser
from ds_llmpq.engine.trace import Trace
from ds_llmpq.scheduler.micro_batch import MicroBatch
from ds_llmpq.scheduler.request_group import Sequence as Request
from ds_llmpq.scheduler.slot_table import SlotTable
from ds_llmpq.scheduler.stream import Stream


@dataclass
class Launched:
    """A pass whose tokens are on their way. `rows`: by slot, the sequence and the position it was launched for;
    `chosen` [2, rows]: the tokens, and whether their logits are numbers."""

    rows: dict[int, tuple[Request, int]]
    chosen: HostCopy

    def fits(self, batch: MicroBatch, table: SlotTable) -> bool:
        """Whether it has the tokens that the micro-batch asks for."""
        return all(
            slot in self.rows and self.rows[slot][0] is table.sequences[slot] and self.rows[slot][1] == place
            for slot, place in ((slot, table.position(slot)) for slot in batch.live)
        )

    def read(self, slots: Sequence[int]) -> list[tuple[int, bool]]:
        """Token of each slot, and whether its logits are numbers."""
        found = dict(zip(self.rows, zip(*self.chosen.read(), strict=True), strict=True))
        return [(token, bool(sound)) for token, sound in (found[slot] for slot in slots)]


class LookAhead:
    """The passes that were launched early, one for each decode group, and each slot's last token on the device.

    `launched`: passes so far; `used`: those among them that a micro-batch asked for.
    """

    def __init__(
        self, steps: StepBuilder, passes: StageRunner, chooser: TokenChooser, trace: Trace, device: torch.device
    ):
        self.steps = steps
        self.passes = passes
        self.chooser = chooser
        self.trace = trace
        self.device = device
        self.launched = self.used = 0
        self._failed = False
        self._passes: dict[int, Launched] = {}
        self._tokens = torch.zeros(0, dtype=torch.long, device=device)

    def begin(self, slots: int) -> None:
        """A stream over so many slots."""
        self._passes.clear()
        if len(self._tokens) < slots:
            self._tokens = torch.zeros(slots, dtype=torch.long, device=self.device)

    def keep_tokens(self, slots: Sequence[int], tokens: torch.Tensor) -> None:
        """tokens [slots], on the device."""
        self._tokens.index_copy_(0, to_device(slots, self.device), tokens)

    def take(self, stream: Stream, batch: MicroBatch) -> Launched | None:
        """The pass of the micro-batch's group, if it was made for these rows; it is forgotten in any case."""
        found = self._passes.pop(_find_group(stream, batch), None)
        if found is None or not found.fits(batch, stream.slots):
            return None
        self.used += 1
        return found

    def choose(self, stream: Stream, batch: MicroBatch, hidden: torch.Tensor, logits: torch.Tensor) -> Launched | None:
        """The tokens of a decode pass that ran in its turn, not read yet; None: they have to be found row by row."""
        if batch.phase == "prefill" or self.chooser.needs_tokens(batch):
            return None
        positions = {slot: stream.slots.position(slot) for slot in batch.live}
        try:
            return self._choose(stream, batch, hidden, logits, positions, 0)
        except Exception:  # met again row by row
            return None

    def launch_next(self, stream: Stream) -> None:
        """The next decode pass, as far as it is known before the tokens of the last one have been read. What raises is
        left to the pass in its turn, which knows whose fault it is."""
        table = stream.slots
        batch = stream.scheduler.forecast(lambda slot: self._ends_by_length(table, slot))
        if batch is None or self.chooser.needs_tokens(batch):
            return
        positions = {slot: table.position(slot) + table.are_awaited([slot]) for slot in batch.live}
        try:
            step = self.steps.decode_at(stream, batch, list(positions.values()))
            step.token_ids = self._last_tokens(batch)
            with self.trace.working("decode", batch.size, tokens=len(batch.live)):
                output = self.passes.run("decode", step)
            self._passes[_find_group(stream, batch)] = self._choose(stream, batch, *output, positions, 1)
            self.launched += 1
        except Exception as error:
            self.note_failure(error)

    def note_failure(self, error: Exception) -> None:
        """Says it once: what raises every time would leave the device waiting for the host, and nobody would know."""
        if not self._failed:
            sys.stderr.write(
                f"ds-llmpq: a decode pass ahead of the host failed ({describe_error(error)}); it runs in its turn\n"
            )
        self._failed = True

    def _choose(
        self, stream: Stream, batch: MicroBatch, hidden: torch.Tensor, logits: torch.Tensor,
        positions: dict[int, int], ahead: int,
    ) -> Launched:  # fmt: skip
        """`ahead`: tokens of each awaited slot that are not recorded before it."""
        table = stream.slots
        counts = [len(table.generated[slot]) + ahead * table.are_awaited([slot]) for slot in batch.live]
        with self.trace.working("sample", batch.size):
            chosen = self.chooser.choose(table, batch, hidden, logits, counts)
            self.keep_tokens(batch.live, chosen[0])
        return Launched({slot: (table.sequences[slot], positions[slot]) for slot in batch.live}, HostCopy(chosen))

    def _last_tokens(self, batch: MicroBatch) -> torch.Tensor:
        """[rows, 1], each slot's last; a slot that goes along brings a running row's, which the model can process."""
        live = set(batch.live)
        index = [slot if slot in live else batch.live[0] for slot in batch.slots]
        return self._tokens[to_device(index, self.device)][:, None]

    def _ends_by_length(self, table: SlotTable, slot: int) -> bool:
        """Whether the slot's sequence is sure to leave its slot with the token it has or that is awaited."""
        row, generated = table.sequences[slot], len(table.generated[slot]) + table.are_awaited([slot])
        full = table.is_full(slot, generated, self.steps.store.capacity)
        return table.has_ended(slot) or generated >= row.max_tokens or full


def _find_group(stream: Stream, batch: MicroBatch) -> int:
    return batch.slots[0] // stream.scheduler.limits.decode_rows
