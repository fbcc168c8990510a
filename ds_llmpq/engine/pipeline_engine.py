"""DeepSpeed's pipeline engine for inference only: prefill and decode as instructions of their own."""

from __future__ import annotations

import logging
from collections import abc
from collections.abc import Callable
from typing import Protocol

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_llmpq.engine import schedules
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.engine.kv_cache import KVStore, NoCache
from ds_llmpq.engine.pipeline_module import PlannedPipelineModule
from ds_llmpq.engine.processors import LogitsProcessors
from ds_llmpq.engine.runner.capture import Capture
from ds_llmpq.engine.runner.captured_decode import CapturedDecode
from ds_llmpq.engine.runner.host_copies import HostCopy, to_device
from ds_llmpq.engine.runner.look_ahead import Launched, LookAhead
from ds_llmpq.engine.sampling import NO_DEFAULTS, sample
from ds_llmpq.engine.stage_run.faults import FaultLog, NeutralRow, Suspects
from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.engine.stage_run.stage_runner import StageRunner
from ds_llmpq.engine.trace import Trace
from ds_llmpq.launch.failures import is_out_of_memory
from ds_llmpq.models.generation import Generation
from ds_llmpq.models.step import Step
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import GREEDY
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import OnFinished, OnTokens, Stream, StreamTimes, TakeGroup

# batch sizes are all the configuration it needs; a precision key would build an optimizer and copy the weights
_CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 60}


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


class InferencePipelineEngine(PipelineEngine):
    """Runs streams of sequences through one stage of the pipeline.

    All stages run the same micro-batches in the same order. `hidden_size` is the width of the hidden states between
    stages. A stream's state is kept in `stream`, None between streams. `neutral_tokens`: tokens that any model of the
    kind bears, should a pass raise and the question be whose fault that is; `faults` says why rows were given up.
    `defaults`: the checkpoint's, of generation. `capture`: records decode passes; None: they run eagerly. `scorer`:
    ends each row with its prefill, having seen the logits of all positions; there is no `stop_rule` then.
    """

    def __init__(
        self,
        module: PlannedPipelineModule,
        store: KVStore | NoCache,
        positional: Callable[[Step], None],
        activations: ActivationChannel,
        tokens: TokenChannel,
        stop_rule: StopRule | None,
        trace: Trace,
        dtype: torch.dtype,
        hidden_size: int,
        neutral_tokens: abc.Sequence[int] = (0, 1),
        defaults: Generation = NO_DEFAULTS,
        capture: Capture | None = None,
        scorer: Scorer | None = None,
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
        self.scorer = scorer
        self.trace = trace
        self.dtype = dtype
        self.hidden_size = hidden_size
        self.defaults = defaults
        self.processors = LogitsProcessors(defaults)
        self.splitter = MicroBatchSplitter(self.stage_id, self.device)
        self.faults = FaultLog(self.stage_id)
        zeros = None if self.is_first_stage() else torch.zeros(1, 1, hidden_size, dtype=dtype, device=self.device)
        self.passes = StageRunner(
            self.module, self.splitter, self.faults, NeutralRow(self.module, store, positional, zeros, neutral_tokens),
            dtype, hidden_size, self.is_last_stage(), self._captured(capture),
        )  # fmt: skip
        # with more stages, tokens go to the others through the host, and other groups fill the time
        alone = capture is not None and self.num_stages == 1
        self.ahead = LookAhead(self.device) if alone else None
        self._early: Launched | None = None
        self._rule_holds = False  # whether the stop rule has judged a token
        self.stream: Stream | None = None
        self.stream_times: list[StreamTimes] = []
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None

    def _captured(self, capture: Capture | None) -> CapturedDecode | None:
        if capture is None:
            return None
        size = 0 if self.is_first_stage() else self.hidden_size
        return CapturedDecode(self.module, self.store, self.positional, capture, self.dtype, size)

    def _broadcast_model(self) -> None:
        """Every rank has read its own layers; there is nothing to make equal, and packed weights must not be cast."""

    @torch.inference_mode()
    def run_stream(
        self,
        first: RequestGroup,
        limits: MicroBatchLimits,
        take_group: TakeGroup,
        on_finished: OnFinished,
        on_tokens: OnTokens | None = None,
    ) -> RequestGroup | None:
        """Generates for all sequences of `first` and of the groups that join it. `take_group()` takes the driver's next
        group on all ranks together, None at their end; one that does not join is returned, for the next stream.

        `on_finished(row, tokens, finish)` is called on every rank when a row's last token is known there; before it,
        `on_tokens(keys, tokens)` with each pass's tokens of rows that go on, where it is given.
        """
        self.store.shape_for(*first.shape)
        if self.ahead is not None:
            self.ahead.begin(first.slots)
        self.stream = stream = Stream(
            first, limits, take_group, on_finished, self._poll_tokens, self._admitted, on_tokens
        )
        self._exec_schedule(schedules.StreamSchedule(stream, stages=self.num_stages, stage_id=self.stage_id))
        self.activations.flush()
        self.tokens.flush()
        if stream.nan_slots:
            self.store.clear()
        self.stream_times.append(stream.times())
        self.stream = None
        return stream.held_back

    def _admitted(self, slot: int, row: Sequence) -> None:
        if self.is_last_stage() and self.scorer is None:
            self.stop_rule.begin(slot, row)
            self.processors.begin(slot, row)

    # Instructions. Each is called by DeepSpeed's `_exec_schedule` with the instruction's arguments.

    def _post_receive(self, batch: MicroBatch) -> None:
        self.activations.post_receive(batch, (batch.size, self._tokens_of(batch), self.hidden_size))

    def _wait_activation(self, batch: MicroBatch) -> None:
        with self.trace.waiting("receive", batch.size):
            self._post_receive(batch)
            self._hidden = self.activations.wait(batch)

    def _send_activation(self, batch: MicroBatch) -> None:
        with self.trace.waiting("send", batch.size):
            self.activations.send(self._hidden)
        self._hidden = None
        self.tokens.post_receive(batch)

    def _prefill_pass(self, batch: MicroBatch) -> None:
        prompts = [self.stream.slots.sequences[slot].prefill_tokens for slot in batch.slots]
        longest = self._tokens_of(batch)
        for slot in batch.slots:
            if slot in self.stream.nan_slots:
                self.store.clear(slot)
                self.stream.nan_slots.discard(slot)
        step = Step(
            positions=torch.arange(longest, device=self.device).expand(batch.size, longest),
            cache=self.store.prefill(batch.slots),
            kv_tokens=longest,
            causal_only=True,
            last=None if self.scorer else to_device([len(tokens) - 1 for tokens in prompts], self.device),
        )
        if self.is_first_stage():
            # padding repeats the row's own token, so a token id that yields NaN affects only rows that contain it
            padded = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in prompts]
            step.token_ids = to_device(padded, self.device)
        with self.trace.working("prefill", batch.size, tokens=sum(map(len, prompts))):
            try:
                self._run_rows("prefill", step, batch)
            except Exception as error:
                if longest <= self.stream.scheduler.limits.prefill_tokens or not is_out_of_memory(error):
                    raise
                self._give_up(batch, error)

    def _decode_pass(self, batch: MicroBatch) -> None:
        table = self.stream.slots
        if self.ahead is not None:
            self._early = self.ahead.take(self._group(batch), batch, table)
            if self._early is not None:
                return
        step = self._decode_step(batch, [table.position(slot) for slot in batch.live])
        if self.is_first_stage():
            live = set(batch.live)
            # slots that go along bring a running row's token, which the model can process, or that row is given up
            along = table.generated[batch.live[0]][-1]
            tokens = [table.generated[slot][-1] if slot in live else along for slot in batch.slots]
            step.token_ids = to_device(tokens, self.device)[:, None]
        with self.trace.working("decode", batch.size, tokens=len(batch.live)):
            self._run_rows("decode", step, batch)

    def _decode_step(self, batch: MicroBatch, positions: abc.Sequence[int]) -> Step:
        """`positions`: of the live slots' last tokens."""
        # how sums over the cache are grouped depends on how much of it is read
        kv_tokens = self.store.capacity if self.stream.batch_invariant else max(positions) + 1
        live = dict(zip(batch.live, positions, strict=True))
        at = to_device([live[slot] if slot in live else self._aside(slot) for slot in batch.slots], self.device)
        return Step(
            positions=at[:, None],
            cache=self.store.decode(batch.slots[0], batch.slots[-1] + 1, at, kv_tokens),
            kv_tokens=kv_tokens,
            causal_only=not self.stream.batch_invariant and min(positions) + 1 == kv_tokens,
        )

    def _aside(self, slot: int) -> int:
        """Where a slot that goes along may write: behind what its sequence's prefill has stored, where the sequence
        itself writes before it reads; what an ended one left is read by none. The same on every stage."""
        row = self.stream.slots.sequences[slot]
        return 0 if row is None else min(len(row.prefill_tokens), self.store.capacity - 1)

    def _run(self, phase: str, step: Step) -> None:
        """Any exception ends it."""
        self._begin(step)
        self._hidden, self._logits = self.passes.run(phase, step)

    def _run_rows(self, phase: str, step: Step, batch: MicroBatch) -> None:
        """Rows whose pass raises are given up; the others pass as if those had been sound."""
        self._begin(step)
        live, rows = set(batch.live), self.stream.slots.sequences
        keys = [rows[slot].key if slot in live else None for slot in batch.slots]
        self._hidden, self._logits = self.passes.run_rows(phase, step, keys)

    def _begin(self, step: Step) -> None:
        step.prepare = self.positional
        step.hidden = self._hidden

    def _give_up(self, batch: MicroBatch, error: Exception) -> None:
        """One row, longer than was planned for, and no memory for it."""
        tokens = self._tokens_of(batch)
        self.splitter.drop_row("prefill", tokens)
        self.faults.note(self.stream.slots.sequences[batch.slots[0]].key, "prefill", error, out_of_memory=True)
        self._hidden, self._logits = self.passes.nothing(1, tokens)

    def _score(self, batch: MicroBatch) -> None:
        """The rows end here; a row that a stage could not run, or whose logits are no numbers, as broken."""
        rows = [self.stream.slots.sequences[slot] for slot in batch.slots]
        given_up = self._hidden[:, 0, 0].isnan().tolist()
        sound = [False] * batch.size
        with self.trace.working("score", batch.size):
            if not all(given_up):  # else the logits have no vocabulary
                sound = self.scorer(rows, self._logits)
        self._hidden = self._logits = None
        ends = zip(given_up, sound, strict=True)
        finish = [int(Finish.NAN_LOGITS if gone or not ok else Finish.STOP) for gone, ok in ends]
        self.tokens.send(torch.zeros(batch.size, dtype=torch.int64), torch.tensor(finish))
        self.stream.record(batch, [0] * batch.size, finish)

    def _sample(self, batch: MicroBatch) -> None:
        if self.scorer is not None:
            self._score(batch)
            return
        early = self._sample_ahead(batch) if self.ahead is not None else None
        if early is not None:
            self._launch_next()
            with self.trace.waiting("tokens", batch.size):
                chosen = early.read(batch.live)
        else:
            with self.trace.working("sample", batch.size):
                chosen = self._sample_rows(batch)
        self._hidden = self._logits = self._early = None
        tokens, finish = [0] * batch.size, [int(Finish.RUNNING)] * batch.size
        places = dict(zip(batch.slots, range(batch.size), strict=True))
        for slot, (token, sound) in zip(batch.live, chosen, strict=True):
            tokens[places[slot]] = token
            finish[places[slot]] = int(self._finish(slot, token) if sound else Finish.NAN_LOGITS)
        self.tokens.send(torch.tensor(tokens), torch.tensor(finish))
        self.stream.record(batch, tokens, finish)

    def _sample_rows(self, batch: MicroBatch) -> list[tuple[int, bool]]:
        """The next token of each live slot, and whether its logits are numbers. Rows that raise are given up."""
        logits = self._live_logits(batch)
        suspects = Suspects(
            lambda: _sample_neutral(logits), lambda: torch.zeros(2, 1, dtype=torch.long, device=self.device)
        )
        counts = [len(self.stream.slots.generated[slot]) for slot in batch.live]
        found = self.splitter.run(
            "sample",
            len(batch.live),
            1,
            lambda start, stop: self._choose(batch.live[start:stop], logits[start:stop].float(), counts[start:stop]),
            suspects,
        )
        for place, error in suspects.failed.items():
            self.faults.note(self.stream.slots.sequences[batch.live[place]].key, "sampling", error)
        chosen = torch.cat(found, 1)
        self._mark_given_up(batch, chosen)
        if self.ahead is not None:
            self.ahead.keep_tokens(batch.live, chosen[0])
        return [(token, bool(sound)) for token, sound in zip(*chosen.tolist(), strict=True)]

    def _mark_given_up(self, batch: MicroBatch, chosen: torch.Tensor) -> None:
        """Rows that a stage could not run: a head of few bits may make numbers of what is none."""
        hidden = self._hidden if len(batch.live) == batch.size else self._hidden[self._live_places(batch)]
        chosen[1] *= ~hidden[:, 0, 0].isnan()

    def _live_logits(self, batch: MicroBatch) -> torch.Tensor:
        logits = self._logits.reshape(batch.size, -1)
        return logits if len(batch.live) == batch.size else logits[self._live_places(batch)]

    def _live_places(self, batch: MicroBatch) -> torch.Tensor:
        return to_device([batch.slots.index(slot) for slot in batch.live], self.device)

    def _choose(self, slots: tuple[int, ...], logits: torch.Tensor, counts: abc.Sequence[int]) -> torch.Tensor:
        """[2, slots] on the device: the next token of each slot, and whether its logits are numbers. `counts`: the
        tokens that each has generated before."""
        rows = [self.stream.slots.sequences[slot] for slot in slots]
        processed = self.processors(logits, slots, [self.stream.slots.generated[slot] for slot in slots])
        tokens = sample(processed, [row.sampling for row in rows], counts, self.defaults)
        # NaN passes through the maximum
        return torch.stack([tokens, logits.amax(-1).isfinite().long()])

    # One decode pass ahead of the host (`engine.runner.look_ahead`).

    def _group(self, batch: MicroBatch) -> int:
        return batch.slots[0] // self.stream.scheduler.limits.decode_rows

    def _sample_ahead(self, batch: MicroBatch) -> Launched | None:
        """The tokens of a decode pass, not read yet; None: `_sample_rows` has to find them."""
        if self._early is not None or batch.phase == "prefill" or self._processes(batch):
            return self._early
        try:
            return self._choose_ahead(batch, {slot: self.stream.slots.position(slot) for slot in batch.live}, 0)
        except Exception:  # met again row by row
            return None

    def _processes(self, batch: MicroBatch) -> bool:
        """Whether what a row asks for needs its tokens on the host."""
        return any(self.processors.any(slot) for slot in batch.live)

    def _choose_ahead(self, batch: MicroBatch, positions: dict[int, int], ahead: int) -> Launched:
        """Chooses tokens of the live slots from `_logits`. `ahead`: tokens of each awaited slot that are not recorded
        before it."""
        table = self.stream.slots
        counts = [len(table.generated[slot]) + ahead * table.are_awaited([slot]) for slot in batch.live]
        with self.trace.working("sample", batch.size):
            chosen = self._choose(batch.live, self._live_logits(batch).float(), counts)
            self._mark_given_up(batch, chosen)
            self.ahead.keep_tokens(batch.live, chosen[0])
        return Launched({slot: (table.sequences[slot], positions[slot]) for slot in batch.live}, HostCopy(chosen))

    def _launch_next(self) -> None:
        """The group's next decode pass, as far as it is known before the tokens of the last one have been read. What
        raises is left to the pass in its turn, which knows whose fault it is."""
        table, self._hidden = self.stream.slots, None
        batch = self.stream.scheduler.forecast(self._ends_by_length)
        if batch is None or self._processes(batch):
            return
        positions = {slot: table.position(slot) + table.are_awaited([slot]) for slot in batch.live}
        try:
            step = self._decode_step(batch, list(positions.values()))
            step.token_ids = self.ahead.tokens(batch)
            with self.trace.working("decode", batch.size, tokens=len(batch.live)):
                self._run("decode", step)
            self.ahead.launch(self._group(batch), self._choose_ahead(batch, positions, 1))
        except Exception as error:
            self.ahead.note_failure(error)

    def _ends_by_length(self, slot: int) -> bool:
        """Whether the slot's sequence is sure to leave its slot with the token it has or that is awaited."""
        table, row = self.stream.slots, self.stream.slots.sequences[slot]
        generated = len(table.generated[slot]) + table.are_awaited([slot])
        full = len(row.prompt) + generated >= self.store.capacity
        return table.has_ended(slot) or generated >= row.max_tokens or full

    def _finish(self, slot: int, token: int) -> Finish:
        """Whether the slot's sequence ends with this token. A stop rule that raises ends it as broken, but for the very
        first token it is asked about."""
        row, generated = self.stream.slots.sequences[slot], len(self.stream.slots.generated[slot]) + 1
        try:
            finish = self.stop_rule(slot, token, generated)
        except Exception as error:
            if not self._rule_holds:
                raise
            self.faults.note(row.key, "stop rule", error)
            return Finish.NAN_LOGITS
        self._rule_holds = True
        if finish is Finish.RUNNING and len(row.prompt) + generated >= self.store.capacity:
            return Finish.PREEMPTED
        return finish

    def _wait_tokens(self, slots: list[int]) -> None:
        if self.stream.slots.are_awaited(slots):
            with self.trace.waiting("tokens", len(slots)):
                while self.stream.slots.are_awaited(slots):
                    self.stream.record(*self.tokens.receive(wait=True))

    def _receive_requests(self) -> None:
        with self.trace.waiting("requests", 0):
            self.stream.take_requests()

    _INSTRUCTION_MAP = {  # noqa: RUF012 -- the name and the form are DeepSpeed's
        schedules.PostReceive: _post_receive,
        schedules.WaitActivation: _wait_activation,
        schedules.SendActivation: _send_activation,
        schedules.PrefillPass: _prefill_pass,
        schedules.DecodePass: _decode_pass,
        schedules.SampleTokens: _sample,
        schedules.WaitTokens: _wait_tokens,
        schedules.ReceiveRequests: _receive_requests,
    }

    def _poll_tokens(self) -> None:
        while (message := self.tokens.receive(wait=False)) is not None:
            self.stream.record(*message)

    def _tokens_of(self, batch: MicroBatch) -> int:
        """Tokens of each row in the micro-batch, with padding."""
        if batch.phase == "decode":
            return 1
        return max(len(self.stream.slots.sequences[slot].prefill_tokens) for slot in batch.slots)


def _sample_neutral(logits: torch.Tensor) -> None:
    sample(torch.zeros_like(logits[:1], dtype=torch.float32), [GREEDY], [0])


def quiet_deepspeed() -> None:
    """DeepSpeed reports each step of its set-up at INFO; the user asked for a batch, not for that."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
