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
from ds_llmpq.scheduler.micro_batch import MicroBatch
from ds_llmpq.scheduler.request_group import Sequence as Request
from ds_llmpq.scheduler.slot_table import SlotTable


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

    def __init__(self, device: torch.device):
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

    def tokens(self, batch: MicroBatch) -> torch.Tensor:
        """[rows, 1], each slot's last; a slot that goes along brings a running row's, which the model can process."""
        live = set(batch.live)
        index = [slot if slot in live else batch.live[0] for slot in batch.slots]
        return self._tokens[to_device(index, self.device)][:, None]

    def note_failure(self, error: Exception) -> None:
        """Says it once: what raises every time would leave the device waiting for the host, and nobody would know."""
        if not self._failed:
            sys.stderr.write(
                f"ds-llmpq: a decode pass ahead of the host failed ({describe_error(error)}); it runs in its turn\n"
            )
        self._failed = True

    def launch(self, group: int, launched: Launched) -> None:
        self._passes[group] = launched
        self.launched += 1

    def take(self, group: int, batch: MicroBatch, table: SlotTable) -> Launched | None:
        """The group's pass, if it was made for these rows; it is forgotten in any case."""
        found = self._passes.pop(group, None)
        if found is None or not found.fits(batch, table):
            return None
        self.used += 1
        return found
