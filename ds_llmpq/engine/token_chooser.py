"""What the last stage makes of a micro-batch's logits: each row's next token and whether the row ends with it, or the
scores of given tokens."""

from __future__ import annotations

from collections import abc
from typing import Protocol

import torch

from ds_llmpq.engine.kv_cache import KVStore, NoCache
from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.engine.sampling import LogitsProcessors, choose_greedily, sample
from ds_llmpq.engine.stage_run.faults import FaultLog, Suspects
from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.models.generation import Generation
from ds_llmpq.scheduler.micro_batch import MicroBatch
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams
from ds_llmpq.scheduler.slot_table import Finish, SlotTable

_DRAWN_LOGITS = 1 << 16  # sorted at once on a CPU: each takes some fifty bytes meanwhile
Chosen = list[tuple[int, bool]]  # of each live slot: its next token, and whether its logits are numbers


class StopRule(Protocol):
    """Decides on the last stage whether a row ends with this token."""

    def begin(self, slot: int, row: Sequence) -> None:
        """A request takes a slot, with the tokens it has generated before."""

    def __call__(self, slot: int, token: int, generated: int) -> Finish:
        """`generated` tokens it has now, with this one."""


class Scorer(Protocol):
    """Looks at what the last stage predicts at every position, instead of choosing a next token."""

    def __call__(self, rows: list[Sequence], logits: torch.Tensor) -> list[bool]:
        """Scores the rows' targets; logits [rows, tokens, vocabulary], right-padded. Whether each row's are numbers."""


class TokenChooser:
    """Hidden states [rows, tokens, features] and logits [rows, vocabulary] are those of all slots of a micro-batch;
    what is chosen, [2, live slots] on their device: next tokens, and whether the logits are numbers."""

    def __init__(
        self, stop_rule: StopRule | None, defaults: Generation, splitter: MicroBatchSplitter, faults: FaultLog,
        store: KVStore | NoCache, device: torch.device,
    ):  # fmt: skip
        self.stop_rule = stop_rule
        self.defaults = defaults
        self.processors = LogitsProcessors(defaults)
        self.splitter = splitter
        self.faults = faults
        self.store = store
        self.device = device
        self._rule_holds = False  # whether the stop rule has judged a token

    def begin(self, slot: int, row: Sequence) -> None:
        """The row takes the slot."""
        self.stop_rule.begin(slot, row)
        self.processors.begin(slot, row)

    def needs_tokens(self, batch: MicroBatch) -> bool:
        """Whether what a row asks for needs its tokens on the host."""
        return any(self.processors.any(slot) for slot in batch.live)

    def choose(
        self, table: SlotTable, batch: MicroBatch, hidden: torch.Tensor, logits: torch.Tensor, counts: abc.Sequence[int]
    ) -> torch.Tensor:
        """`counts`: the tokens that each live slot has generated before. Any exception ends it."""
        chosen = self._choose(table, batch.live, self._select_live(batch, logits).float(), counts)
        self._mark_given_up(batch, hidden, chosen)
        return chosen

    def choose_rows(
        self, table: SlotTable, batch: MicroBatch, hidden: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Rows that raise are given up."""
        logits = self._select_live(batch, logits)
        suspects = Suspects(
            lambda: _sample_neutral(logits), lambda: torch.zeros(2, 1, dtype=torch.long, device=self.device)
        )
        counts = [len(table.generated[slot]) for slot in batch.live]
        found = self.splitter.run(
            "sample",
            len(batch.live),
            1,
            lambda start, stop: self._choose(
                table, batch.live[start:stop], logits[start:stop].float(), counts[start:stop]
            ),
            suspects,
        )
        for place, error in suspects.failed.items():
            self.faults.note(table.sequences[batch.live[place]].key, "sampling", error)
        chosen = torch.cat(found, 1)
        self._mark_given_up(batch, hidden, chosen)
        return chosen

    def judge(self, table: SlotTable, batch: MicroBatch, chosen: Chosen) -> tuple[list[int], list[int]]:
        """Tokens and finish codes of all slots."""
        tokens, finish = [0] * batch.size, [int(Finish.RUNNING)] * batch.size
        places = dict(zip(batch.slots, range(batch.size), strict=True))
        for slot, (token, sound) in zip(batch.live, chosen, strict=True):
            tokens[places[slot]] = token
            finish[places[slot]] = int(self._judge_row(table, slot, token) if sound else Finish.NAN_LOGITS)
        return tokens, finish

    def _choose(
        self, table: SlotTable, slots: tuple[int, ...], logits: torch.Tensor, counts: abc.Sequence[int]
    ) -> torch.Tensor:
        rows = [table.sequences[slot].sampling for slot in slots]
        processed = self.processors(logits, slots, [table.generated[slot] for slot in slots])
        if self.device.type == "cpu":
            return self._choose_on_host(logits, processed, rows, counts)
        tokens = sample(processed, rows, counts, self.defaults)
        # NaN passes through the maximum
        return torch.stack([tokens, logits.amax(-1).isfinite().long()])

    def _choose_on_host(
        self, logits: torch.Tensor, processed: torch.Tensor, rows: list[SamplingParams], counts: abc.Sequence[int]
    ) -> torch.Tensor:
        """Only rows whose tokens are drawn pay for it, a few at a time."""
        chosen = choose_greedily(logits, processed)
        drawn = [place for place, row in enumerate(rows) if row.temperature > 0]
        step = max(1, _DRAWN_LOGITS // processed.shape[-1])
        for start in range(0, len(drawn), step):
            some = drawn[start : start + step]
            picked, steps = [rows[place] for place in some], [counts[place] for place in some]
            chosen[0, some] = sample(processed[some], picked, steps, self.defaults)
        return chosen

    def _mark_given_up(self, batch: MicroBatch, hidden: torch.Tensor, chosen: torch.Tensor) -> None:
        """Rows that a stage could not run: a head of few bits may make numbers of what is none."""
        hidden = hidden if len(batch.live) == batch.size else hidden[self._find_live(batch)]
        chosen[1] *= ~hidden[:, 0, 0].isnan()

    def _select_live(self, batch: MicroBatch, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.reshape(batch.size, -1)
        return logits if len(batch.live) == batch.size else logits[self._find_live(batch)]

    def _find_live(self, batch: MicroBatch) -> torch.Tensor:
        places = {slot: place for place, slot in enumerate(batch.slots)}
        return to_device([places[slot] for slot in batch.live], self.device)

    def _judge_row(self, table: SlotTable, slot: int, token: int) -> Finish:
        """Whether the slot's sequence ends with this token. A stop rule that raises ends it as broken, but for the very
        first token it is asked about."""
        row, generated = table.sequences[slot], len(table.generated[slot]) + 1
        try:
            finish = self.stop_rule(slot, token, generated)
        except Exception as error:
            if not self._rule_holds:
                raise
            self.faults.note(row.key, "stop rule", error)
            return Finish.NAN_LOGITS
        self._rule_holds = True
        if finish is Finish.RUNNING and table.is_full(slot, generated, self.store.capacity):
            return Finish.PREEMPTED
        return finish


def _sample_neutral(logits: torch.Tensor) -> None:
    sample(torch.zeros_like(logits[:1], dtype=torch.float32), [GREEDY], [0])


def score_rows(scorer: Scorer, rows: list[Sequence], hidden: torch.Tensor, logits: torch.Tensor) -> list[int]:
    """Finish codes of rows that end with their prefill; a row that a stage could not run, or whose logits are no
    numbers, ends as broken."""
    given_up = hidden[:, 0, 0].isnan().tolist()
    sound = [False] * len(rows)
    if not all(given_up):  # else the logits have no vocabulary
        sound = scorer(rows, logits)
    ends = zip(given_up, sound, strict=True)
    return [int(Finish.NAN_LOGITS if gone or not ok else Finish.STOP) for gone, ok in ends]
