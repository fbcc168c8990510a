"""Teacher-forced scoring on the pipeline engine: one prefill pass over all positions, nothing is generated.

The same engine, stages, channels and schedule as in serving; only the last stage looks at every position instead of
sampling from the last one, and nothing is cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ds_llmpq.engine import schedules
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.pipeline_engine import InferencePipelineEngine
from ds_llmpq.engine.session import Session
from ds_llmpq.evaluation.rows import RowBatch, RowScore, ScoredRow
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.step import Step
from ds_llmpq.scheduler.micro_batch import MicroBatch, cut_prefill
from ds_llmpq.scheduler.slot_table import Finish

_LOGIT_BYTES = 256 << 20  # of one micro-batch, in float32
_ROWS_AT_ONCE = 64  # handed to the pipeline together


class Reference:
    """Log-probabilities of the reference model, [targets, vocabulary] float32 in a file on the last stage's host."""

    def __init__(self, path: Path, targets: int, vocabulary: int, write: bool):
        self.write = write
        self._values = np.memmap(path, np.float32, "w+" if write else "r", shape=(targets, vocabulary))

    def keep(self, offset: int, values: torch.Tensor) -> None:
        self._values[offset : offset + len(values)] = values.cpu().numpy()

    def read(self, offset: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self._values[offset : offset + count].copy())

    def close(self) -> None:
        if self.write:
            self._values.flush()


class ScoringEngine(InferencePipelineEngine):
    """Scores the rows of a batch; `scores` holds them by row on the last stage."""

    asked: tuple[ScoredRow, ...]
    scores: dict[int, RowScore]
    reference: Reference | None = None

    @torch.inference_mode()
    def score(self, batch: RowBatch, micro_batches: list[MicroBatch]) -> list[RowScore] | None:
        """The scores in the rows' order on the last stage, None elsewhere."""
        self.asked, self.scores = batch.rows, {}
        self._exec_schedule(schedules.OncePerBatch(micro_batches, stages=self.num_stages, stage_id=self.stage_id))
        self.activations.flush()
        return [self.scores[row] for row in range(len(batch.rows))] if self.is_last_stage() else None

    def _pass(self, batch: MicroBatch) -> None:
        rows, longest = [self.asked[slot] for slot in batch.slots], self._tokens_of(batch)
        step = Step(
            positions=torch.arange(longest, device=self.device).expand(batch.size, longest),
            cache=None,
            kv_tokens=longest,
            causal_only=True,
        )
        if self.is_first_stage():
            padded = [row.prompt + (0,) * (longest - len(row.prompt)) for row in rows]
            step.token_ids = torch.tensor(padded, device=self.device)
        with self.trace.working("prefill", batch.size, tokens=sum(len(row.prompt) for row in rows)):
            self._run("prefill", step)

    def _tokens_of(self, batch: MicroBatch) -> int:
        return max(len(self.asked[slot].prompt) for slot in batch.slots)

    def _give(self, batch: MicroBatch) -> None:
        self.activations.send(self._hidden)
        self._hidden = None

    def _look(self, batch: MicroBatch) -> None:
        for place, row in enumerate(batch.slots):
            asked = self.asked[row]
            stop = len(asked.prompt)
            logits = self._logits[place, stop - len(asked.targets) : stop].float()
            self.scores[row] = self._score(asked, logits.log_softmax(-1))
        self._hidden = self._logits = None

    def _score(self, row: ScoredRow, found: torch.Tensor) -> RowScore:
        targets = torch.tensor(row.targets, device=found.device)
        likely = found.argmax(-1)
        logprobs = found.gather(-1, targets[:, None])[:, 0].double().tolist()
        kl = agree = None
        if self.reference is not None and row.offset is not None:
            if self.reference.write:
                self.reference.keep(row.offset, found)
            else:
                wanted = self.reference.read(row.offset, len(row.targets)).to(found.device)
                kl = float((wanted.exp() * (wanted - found)).sum(-1).double().sum())
                agree = int((wanted.argmax(-1) == likely).sum())
        return RowScore(logprobs, (likely == targets).tolist(), kl, agree)

    _INSTRUCTION_MAP = {  # noqa: RUF012 -- the name and the form are DeepSpeed's
        **InferencePipelineEngine._INSTRUCTION_MAP,
        schedules.PrefillPass: _pass,
        schedules.SendActivation: _give,
        schedules.Sample: _look,
    }


class ScoringSession(Session):
    """A loaded stage that scores. The driver calls `scores`, the other ranks `follow` until the driver is done."""

    engine_type = ScoringEngine

    def scores(self, rows: Sequence[ScoredRow]) -> Iterator[RowScore]:
        """Driver: the scores of `rows`, in order, as they come."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            batch = RowBatch(tuple(rows[start : start + _ROWS_AT_ONCE]))
            self.context.data.broadcast(batch.to_bytes())
            found = self._together(batch)
            yield from (RowScore(**score) for score in found)

    def follow(self) -> None:
        while data := self.context.data.broadcast(None):
            self._together(RowBatch.from_bytes(data))

    def done(self) -> None:
        """Driver: lets the others go."""
        self.context.data.broadcast(None)

    def _together(self, batch: RowBatch) -> list[dict] | None:
        lengths = [len(row.prompt) for row in batch.rows]
        tokens = max(1, _LOGIT_BYTES // (4 * self._vocabulary))
        own = self.engine.score(batch, cut_prefill(lengths, self.plan.micro_batch.prefill, tokens))
        gathered = self.context.data.gather([score.to_json() for score in own] if own is not None else None)
        return next(scores for scores in gathered if scores is not None) if gathered is not None else None

    compiled = False  # a graph wants a cache of whole rows

    def _kv_store(self, model_path: str | Path) -> KVStore:
        """Nothing is cached, so the least that can be allocated."""
        shape = read_shape(model_path)
        self._vocabulary = shape.vocab
        first, last = self.context.stage.layers
        return KVStore(first, last - first, 1, shape.kv_heads, shape.head_dim, self.dtype, self.context.device)


class NoStop:
    """Nothing is generated, so nothing ends."""

    def begin(self, slot: int, row: object) -> None: ...

    def __call__(self, slot: int, token: int, generated: int) -> Finish:
        return Finish.RUNNING
