"""Teacher-forced scoring: rows of given tokens run through a serving session, one prefill pass each.

Engine, stages, channels and schedule are those of serving. But the last stage scores every position instead of sampling
from the last one, and nothing is cached.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_llmpq.engine.session import Session
from ds_llmpq.engine.stage_run.faults import Fault
from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.config import ScoringTask
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import OnFinished, TakeGroup

_SLOTS = 64
_CAPACITY = 1  # of a slot, in which nothing is cached


@dataclass(frozen=True)
class RowScore:
    """For one row: each target's log-probability in nats, and whether it was the most likely token. With a reference
    also the sum of KL(reference || model), and at how many positions both have the same most likely token."""

    logprobs: list[float]
    greedy: list[bool]
    kl: float | None = None
    agree: int | None = None


def build_row(key: int, tokens: abc.Sequence[int], scored: int | None = None) -> Sequence:
    """The row that scores the last `scored` of `tokens` (None: all but the first)."""
    count = len(tokens) - 1 if scored is None else scored
    return Sequence(key, tuple(tokens[:-1]), 1, targets=tuple(tokens[len(tokens) - count :]))


class Reference:
    """Log-probabilities of the reference model in a file on the last stage's host: float32 [targets, vocabulary] for
    each row, always in the same order, for as many rows as fit in `most_bytes`."""

    def __init__(self, path: Path, keeps: bool, most_bytes: int):
        self.keeps = keeps
        self._left = most_bytes
        self._file = path.open("wb" if keeps else "rb")

    def holds(self, shape: abc.Sequence[int]) -> bool:
        """Whether the next row is in the file."""
        self._left -= 4 * shape[0] * shape[1]
        return self._left >= 0

    def write(self, values: torch.Tensor) -> None:
        self._file.write(values.cpu().numpy().tobytes())

    def read(self, shape: abc.Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(self._file, np.float32, shape[0] * shape[1]).reshape(tuple(shape)))

    def close(self) -> None:
        self._file.close()


class TargetScorer:
    """The engine's `Scorer`: `scores` holds the results of the last stage by the rows' keys."""

    def __init__(self, task: ScoringTask, is_last: bool):
        self.scores: dict[int, RowScore] = {}
        self.reference: Reference | None = None
        if task.reference and is_last:
            self.reference = Reference(Path(task.reference), task.keeps_reference, task.settings.reference_bytes)

    def __call__(self, rows: list[Sequence], logits: torch.Tensor) -> list[bool]:
        sound = []
        for place, row in enumerate(rows):
            stop = len(row.prompt)
            found = logits[place, stop - len(row.targets) : stop].float().log_softmax(-1)
            sound.append(bool(found.isfinite().any(-1).all()))
            if sound[-1]:
                self.scores[row.key] = self._score(row, found)
        return sound

    def _score(self, row: Sequence, found: torch.Tensor) -> RowScore:
        targets = torch.tensor(row.targets, device=found.device)
        likely = found.argmax(-1)
        logprobs = found.gather(-1, targets[:, None])[:, 0].double().tolist()
        kl = agree = None
        if self.reference is not None and self.reference.holds(found.shape):
            if self.reference.keeps:
                self.reference.write(found)
            else:
                wanted = self.reference.read(found.shape).to(found.device)
                kl = float((wanted.exp() * (wanted - found)).sum(-1).double().sum())
                agree = int((wanted.argmax(-1) == likely).sum())
        return RowScore(logprobs, (likely == targets).tolist(), kl, agree)

    def close(self) -> None:
        if self.reference is not None:
            self.reference.close()


class ScoringRounds:
    """Runs rows through a session with a `TargetScorer` each time the driver calls `score`; the other ranks `follow`
    until the driver is `done`."""

    def __init__(self, session: Session, scorer: TargetScorer):
        self.session = session
        self.scorer = scorer
        self._data = session.context.data

    def score(self, rows: abc.Sequence[Sequence], show: Callable[[str, int, int], None]) -> list[RowScore]:
        """On the driver: the scores of `rows`, whose keys are 0, 1, ..., in order. `UserError`: a stage could not run a
        row, or its logits are not numbers."""
        self._data.broadcast(b"rows")
        micro_batch = self.session.plan.micro_batch
        slots = max(_SLOTS, 2 * micro_batch.prefill, 2 * micro_batch.decode)
        starts = iter(range(0, len(rows), slots))

        def take() -> RequestGroup | None:
            start = next(starts, None)
            if start is None:
                return None
            return RequestGroup(tuple(rows[start : start + slots]), slots, _CAPACITY, joins=True)

        ended = 0

        def show_row(row: Sequence, tokens: list[int], finish: Finish) -> None:
            nonlocal ended
            ended += 1
            show("score", ended, len(rows))

        found = self._run(take, show_row)
        return [RowScore(**found[row.key]) for row in rows]

    def follow(self) -> None:
        while self._data.broadcast(None):
            self._run(lambda: None, lambda *ended: None)

    def done(self) -> None:
        """On the driver: ends `follow` on the other ranks."""
        self._data.broadcast(None)

    def _run(self, take: TakeGroup, on_finished: OnFinished) -> dict[int, dict[str, Any]]:
        """On the driver: the results of the last stage by key."""
        self.session.run_all(take, on_finished, _refuse)
        gathered = self._data.gather([[key, asdict(score)] for key, score in self.scorer.scores.items()])
        self.scorer.scores.clear()
        return {key: score for found in gathered or () for key, score in found}


def _refuse(row: Sequence, fault: Fault | None) -> None:
    why = "its logits are not numbers; try another compute dtype" if fault is None else f"{fault.kind}: {fault.message}"
    raise UserError(f"Row {row.key} of {len(row.prompt)} tokens cannot be scored ({why}).")
