"""DeepSpeed's pipeline engine for inference only: prefill and decode as schedules of their own instructions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_llmpq.engine import schedules
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.engine.pipeline_module import PlannedPipelineModule
from ds_llmpq.engine.sampling import sample
from ds_llmpq.engine.sequences import Finish, MicroBatch, Sequences
from ds_llmpq.engine.trace import Trace
from ds_llmpq.engine.wave import Wave
from ds_llmpq.models.step import Step

# batch sizes are all the configuration it needs; a precision key would build an optimizer and copy the weights
_CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 60}


@dataclass(frozen=True)
class WaveTimes:
    """One wave as this rank saw it. Prefill lasts until every row's first token is known here, decode from there on."""

    SUMMED: ClassVar[tuple[str, ...]] = (
        "rows",
        "prompt_tokens",
        "generated_tokens",
        "decode_rounds",
        "prefill_seconds",
        "decode_seconds",
    )
    rows: int
    prompt_tokens: int
    generated_tokens: int
    decode_rounds: int
    prefill_seconds: float
    decode_seconds: float


class StopRule(Protocol):
    """Decides on the last stage whether a row ends with this token."""

    def begin(self, wave: Wave) -> None: ...

    def __call__(self, row: int, token: int, generated: int) -> Finish: ...


class InferencePipelineEngine(PipelineEngine):
    """Runs waves of sequences through one stage of the pipeline.

    All stages execute the same schedules over the same micro-batches. `hidden_size` is the width of the hidden states
    between stages, `on_finished(row)` is called on every rank when a row's last token is known there.
    """

    def __init__(
        self,
        module: PlannedPipelineModule,
        store: KVStore,
        positional: Callable[[Step], None],
        activations: ActivationChannel,
        tokens: TokenChannel,
        stop_rule: StopRule,
        trace: Trace,
        dtype: torch.dtype,
        hidden_size: int,
    ):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        grid = module.mpu()
        config = DeepSpeedConfig(dict(_CONFIG), grid)
        super().__init__(args=None, model=module, mpu=grid, config=_CONFIG, config_class=config)
        self.module.eval()
        self.store = store
        self.positional = positional
        self.activations = activations
        self.tokens = tokens
        self.stop_rule = stop_rule
        self.trace = trace
        self.dtype = dtype
        self.hidden_size = hidden_size
        self.sequences = Sequences([])
        self.wave = Wave(())
        self.on_finished: Callable[[int], None] = lambda row: None
        self.wave_times: list[WaveTimes] = []
        self._prefilled = 0.0  # perf_counter when the wave's last first token became known, 0 before
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None

    def _broadcast_model(self) -> None:
        """Every rank has read its own layers; there is nothing to make equal, and packed weights must not be cast."""

    @torch.inference_mode()
    def run_wave(
        self,
        wave: Wave,
        prefill: list[MicroBatch],
        decode: list[MicroBatch],
        on_finished: Callable[[int], None] = lambda row: None,
    ) -> Sequences:
        """Generates for all rows of `wave`; returns their tokens and finishes, known on every rank."""
        started, self._prefilled = time.perf_counter(), 0.0
        self.wave = wave
        self.sequences = Sequences([len(row.prompt) for row in wave.rows])
        self.on_finished = on_finished
        self.store.shape_for(len(wave.rows), wave.capacity)
        if self.is_last_stage():
            self.stop_rule.begin(wave)
        place = {"stages": self.num_stages, "stage_id": self.stage_id}
        self._exec_schedule(schedules.PrefillSchedule(prefill, **place))
        self._exec_schedule(schedules.DecodeSchedule(decode, self.sequences, self._poll_tokens, **place))
        self.activations.flush()
        self.tokens.flush()
        if Finish.BROKEN in self.sequences.finish:
            self.store.clear()
        self._note_times(started)
        return self.sequences

    def _note_times(self, started: float) -> None:
        lengths = [len(tokens) for tokens in self.sequences.generated]
        self.wave_times.append(
            WaveTimes(
                rows=len(lengths),
                prompt_tokens=sum(self.sequences.prompt_tokens),
                generated_tokens=sum(lengths),
                decode_rounds=max(lengths) - 1,
                prefill_seconds=self._prefilled - started,
                decode_seconds=time.perf_counter() - self._prefilled,
            )
        )

    # Instructions. Each is called by DeepSpeed's `_exec_schedule` with the instruction's arguments.

    def _post_receive(self, micro_batch: MicroBatch, prefill: bool) -> None:
        tokens = self._longest(micro_batch) if prefill else 1
        self.activations.post(micro_batch, (micro_batch.size, tokens, self.hidden_size))

    def _take_activation(self, micro_batch: MicroBatch, prefill: bool) -> None:
        with self.trace.waiting("receive", micro_batch):
            self._post_receive(micro_batch, prefill)
            self._hidden = self.activations.take(micro_batch)

    def _give_activation(self, micro_batch: MicroBatch) -> None:
        with self.trace.waiting("send", micro_batch):
            self.activations.give(self._hidden)
        self._hidden = None
        self._await_tokens(micro_batch)

    def _prefill_pass(self, micro_batch: MicroBatch) -> None:
        lengths = [len(self.wave.rows[row].prompt) for row in micro_batch.rows()]
        longest = max(lengths)
        step = Step(
            positions=torch.arange(longest, device=self.device).expand(micro_batch.size, longest),
            cache=self.store.prefill(micro_batch.start, micro_batch.stop),
            kv_tokens=longest,
            causal_only=True,
            last=torch.tensor(lengths, device=self.device) - 1,
        )
        if self.is_first_stage():
            # padding is of the row's own, so that a token the model cannot bear harms only rows that hold it
            padded = [row.prompt + row.prompt[-1:] * (longest - len(row.prompt)) for row in self._rows(micro_batch)]
            step.token_ids = torch.tensor(padded, device=self.device)
        with self.trace.working("prefill", micro_batch, tokens=sum(lengths)):
            self._run(step)

    def _decode_pass(self, micro_batch: MicroBatch) -> None:
        positions = self.sequences.positions(micro_batch)
        kv_tokens = max(positions) + 1
        at = torch.tensor(positions, device=self.device)
        step = Step(
            positions=at[:, None],
            cache=self.store.decode(micro_batch.start, micro_batch.stop, at, kv_tokens),
            kv_tokens=kv_tokens,
            causal_only=min(positions) + 1 == kv_tokens,
        )
        if self.is_first_stage():
            step.token_ids = torch.tensor(self.sequences.last_tokens(micro_batch), device=self.device)[:, None]
        with self.trace.working("decode", micro_batch, tokens=micro_batch.size):
            self._run(step)

    def _run(self, step: Step) -> None:
        step.prepare = self.positional
        step.hidden = self._hidden
        step = self.module(step)
        self._hidden = step.hidden
        self._logits = step.logits

    def _sample(self, micro_batch: MicroBatch) -> None:
        with self.trace.working("sample", micro_batch):
            generated = [len(self.sequences.generated[row]) for row in micro_batch.rows()]
            logits = self._logits.reshape(micro_batch.size, -1).float()
            tokens = sample(logits, [row.sampling for row in self._rows(micro_batch)], generated)
            # one transfer for both: tokens, and whether the row's logits are numbers (NaN passes through the maximum)
            chosen, sound = torch.stack([tokens, logits.amax(-1).isfinite().long()]).tolist()
            finish = [
                self._finish(row, token, count, ok)
                for row, token, count, ok in zip(micro_batch.rows(), chosen, generated, sound, strict=True)
            ]
        self._hidden = self._logits = None
        self.tokens.give(torch.tensor(chosen), torch.tensor(finish))
        self._record(micro_batch, chosen, finish)

    def _finish(self, row: int, token: int, generated: int, sound: int) -> Finish:
        if self.sequences.finish[row] is not Finish.RUNNING:
            return self.sequences.finish[row]
        if not sound:
            return Finish.BROKEN
        return self.stop_rule(row, token, generated + 1)

    def _take_tokens(self, micro_batch: MicroBatch) -> None:
        if self.sequences.awaited(micro_batch):
            with self.trace.waiting("tokens", micro_batch):
                while self.sequences.awaited(micro_batch):
                    self._record(*self.tokens.take(wait=True))

    _INSTRUCTION_MAP = {  # noqa: RUF012 -- the name and the form are DeepSpeed's
        schedules.PostReceive: _post_receive,
        schedules.TakeActivation: _take_activation,
        schedules.GiveActivation: _give_activation,
        schedules.PrefillPass: _prefill_pass,
        schedules.DecodePass: _decode_pass,
        schedules.Sample: _sample,
        schedules.TakeTokens: _take_tokens,
    }

    def _await_tokens(self, micro_batch: MicroBatch) -> None:
        self.sequences.started(micro_batch)
        self.tokens.expect(micro_batch)

    def _poll_tokens(self) -> None:
        while (message := self.tokens.take(wait=False)) is not None:
            self._record(*message)

    def _record(self, micro_batch: MicroBatch, tokens: list[int], finish: list[int]) -> None:
        finished = self.sequences.record(micro_batch, tokens, finish)
        if not self._prefilled and all(self.sequences.generated):
            self._prefilled = time.perf_counter()
        for row in finished:
            self.on_finished(row)

    def _rows(self, micro_batch: MicroBatch):
        return self.wave.rows[micro_batch.start : micro_batch.stop]

    def _longest(self, micro_batch: MicroBatch) -> int:
        return max(len(row.prompt) for row in self._rows(micro_batch))


def quiet_deepspeed() -> None:
    """DeepSpeed reports each step of its set-up at INFO; the user asked for a batch, not for that."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
