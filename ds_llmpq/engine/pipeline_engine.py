"""DeepSpeed's pipeline engine for inference only: prefill and decode as instructions of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_llmpq.engine import schedules
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.engine.kv_cache import KVStore, NoCache
from ds_llmpq.engine.paged_cache import PagedKVStore
from ds_llmpq.engine.pipeline_module import PlannedPipelineModule
from ds_llmpq.engine.runner.capture import Capture
from ds_llmpq.engine.runner.captured_decode import CapturedDecode
from ds_llmpq.engine.runner.captured_pages import CapturedPages
from ds_llmpq.engine.runner.fusion import Fusion
from ds_llmpq.engine.runner.host_copies import HostCopy
from ds_llmpq.engine.runner.look_ahead import Launched, LookAhead
from ds_llmpq.engine.sampling import NO_DEFAULTS
from ds_llmpq.engine.stage_run.faults import FaultLog, NeutralRow
from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.engine.stage_run.stage_runner import StageRunner
from ds_llmpq.engine.step_builder import StepBuilder
from ds_llmpq.engine.token_chooser import Chosen, Scorer, StopRule, TokenChooser, score_rows
from ds_llmpq.engine.trace import Trace
from ds_llmpq.launch.failures import is_out_of_memory
from ds_llmpq.models.generation import Generation
from ds_llmpq.models.step import Step
from ds_llmpq.scheduler.micro_batch import MicroBatch, MicroBatchLimits
from ds_llmpq.scheduler.request_group import RequestGroup
from ds_llmpq.scheduler.request_group import Sequence as Request
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import OnFinished, OnTokens, Stream, StreamTimes, TakeGroup

_NOBODY = -1  # the key of a sequence that no request waits for
# batch sizes are all the configuration it needs; a precision key would build an optimizer and copy the weights
_CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 60}


class InferencePipelineEngine(PipelineEngine):
    """Runs streams of sequences through one stage of the pipeline.

    All stages run the same micro-batches in the same order. `hidden_size` is the width of the hidden states between
    stages. A stream's state is kept in `stream`, None between streams. `neutral_tokens`: tokens that any model of the
    kind bears, should a pass raise and the question be whose fault that is; `faults` says why rows were given up.
    `defaults`: the checkpoint's, of generation. `capture`: records decode passes; None: they run eagerly. `fusion`:
    compiled blocks for decode passes. `scorer`: ends each row with its prefill, having seen the logits of all
    positions; there is no `stop_rule` then.
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
        neutral_tokens: Sequence[int] = (0, 1),
        defaults: Generation = NO_DEFAULTS,
        capture: Capture | None = None,
        scorer: Scorer | None = None,
        fusion: Fusion | None = None,
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
        self.scorer = scorer
        self.trace = trace
        self.dtype = dtype
        self.hidden_size = hidden_size
        self.splitter = MicroBatchSplitter(self.stage_id, self.device)
        self.faults = FaultLog(self.stage_id)
        zeros = None if self.is_first_stage() else torch.zeros(1, 1, hidden_size, dtype=dtype, device=self.device)
        self.passes = StageRunner(
            self.module, self.splitter, self.faults, NeutralRow(self.module, store, positional, zeros, neutral_tokens),
            dtype, hidden_size, self.is_last_stage(), self._build_captured(capture, fusion), fusion,
        )  # fmt: skip
        self.steps = StepBuilder(store, positional, self.device, self.is_first_stage(), scorer is not None)
        self.chooser = TokenChooser(stop_rule, defaults, self.splitter, self.faults, store, self.device)
        # with more stages, tokens go to the others through the host: the next group's pass fills the time
        alone = capture is not None and self.num_stages == 1
        self.ahead = LookAhead(self.steps, self.passes, self.chooser, trace, self.device) if alone else None
        self._reads_late = capture is not None and not alone
        self._unread: tuple[MicroBatch, HostCopy] | None = None  # the last micro-batch, and its tokens
        self._early: Launched | None = None
        self.prefix: tuple[int, ...] = ()  # whose keys and values the store holds
        self._lost: set[int] = set()  # slots of long prompts of which this stage could not run a chunk
        self.stream: Stream | None = None
        self.stream_times: list[StreamTimes] = []
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # by the micro-batch's number

    def _build_captured(self, capture: Capture | None, fusion: Fusion | None) -> CapturedDecode | None:
        if capture is None:
            return None
        size = 0 if self.is_first_stage() else self.hidden_size
        kind = CapturedPages if isinstance(self.store, PagedKVStore) else CapturedDecode
        return kind(self.module, self.store, self.positional, capture, self.dtype, size, fusion=fusion)

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
            first, limits, take_group, on_finished, self._poll_tokens, self._admit, on_tokens, self.prefix
        )
        if isinstance(self.store, PagedKVStore):
            self.store.tables = stream.scheduler.pool.tables
        self._exec_schedule(schedules.StreamSchedule(stream, stages=self.num_stages, stage_id=self.stage_id))
        self._read_tokens()
        self.activations.flush()
        self.tokens.flush()
        if stream.nan_slots or stream.nan_blocks:
            self.store.clear()
        self.stream_times.append(stream.times())
        self.stream = None
        return stream.held_back

    def share_prefix(self, prefix: tuple[int, ...], limits: MicroBatchLimits) -> None:
        """Computes tokens that sequences of later streams may begin with, on all ranks together; (): none. It passes as
        a sequence of its own. If that is given up it is not shared, and each row shows whose fault it is."""
        self.prefix, ended = (), []
        self.store.hold_prefix(0)
        if not prefix:
            return
        group = RequestGroup((Request(_NOBODY, prefix, 1),), 1, len(prefix))
        self.run_stream(group, limits, lambda: None, lambda row, tokens, finish: ended.append(finish))
        self.stream_times[-1] = replace(self.stream_times[-1], of_prefix=True)
        if ended != [Finish.NAN_LOGITS]:
            self.store.hold_prefix(len(prefix))
            self.prefix = prefix

    def _admit(self, slot: int, row: Request) -> None:
        if self.is_last_stage() and self.scorer is None:
            self.chooser.begin(slot, row)

    # Instructions. Each is called by DeepSpeed's `_exec_schedule` with the instruction's arguments.

    def _post_receive(self, batch: MicroBatch) -> None:
        self.activations.post_receive(batch, (batch.size, self._count_row_tokens(batch), self.hidden_size))

    def _wait_activation(self, batch: MicroBatch) -> None:
        with self.trace.waiting("receive", batch.size):
            self._post_receive(batch)
            self._held[batch.number] = self.activations.wait(batch), None

    def _take_held(self, batch: MicroBatch) -> None:
        """What was received for it, or what a call of several has given it."""
        if batch.number in self._held:
            self._hidden, self._logits = self._held.pop(batch.number)

    def _send_activation(self, batch: MicroBatch) -> None:
        self._take_held(batch)
        with self.trace.waiting("send", batch.size):
            self.activations.send(self._hidden)
        self._hidden = None
        if batch.live:
            self.tokens.post_receive(batch)

    def _joined_pass(self, batches: list[MicroBatch]) -> None:
        outputs = None
        for batch in batches:
            self._clear_nan(batch)
            self._lost.difference_update(batch.slots if batch.sequences else ())
        if self._lost.isdisjoint(slot for batch in batches for slot in batch.slots):
            steps = [getattr(self.steps, batch.phase)(self.stream, batch) for batch in batches]
            for batch, step in zip(batches, steps, strict=True):
                step.hidden, _ = self._held.get(batch.number, (None, None))
            with self.trace.sharing([(batch.phase, batch.size, self._count_tokens(batch)) for batch in batches]):
                outputs = self.passes.run_together(steps)
        for place, batch in enumerate(batches):
            if outputs is None:
                (self._prefill_pass if batch.phase == "prefill" else self._decode_pass)(batch)
            self._held[batch.number] = outputs[place] if outputs else (self._hidden, self._logits)

    def _prefill_pass(self, batch: MicroBatch) -> None:
        self._take_held(batch)
        self._clear_nan(batch)
        self._lost.difference_update(batch.slots if batch.sequences else ())
        if self._lost.intersection(batch.slots):
            self._hidden, self._logits = self.passes.fill_with_nan(1, self._count_row_tokens(batch))
            return
        step = self.steps.prefill(self.stream, batch)
        rows = [self.stream.slots.sequences[slot] for slot in batch.slots]
        with self.trace.working("prefill", batch.size, tokens=self._count_tokens(batch)):
            try:
                self._run_rows("prefill", step, batch)
            except Exception as error:
                longest = max(len(row.prefill_tokens) for row in rows) - (0 if batch.tokens else batch.past)
                if longest <= self.stream.scheduler.limits.prefill_tokens or not is_out_of_memory(error):
                    raise
                self._give_up(batch, error)
        if not batch.live and rows[0].key in self.faults:
            self._lost.update(batch.slots)

    def _clear_nan(self, batch: MicroBatch) -> None:
        """Of what sequences that are gone may have left, before others store theirs there."""
        for slot in self.stream.nan_slots.intersection(batch.slots):
            self.store.clear(slot)
            self.stream.nan_slots.discard(slot)
        if self.stream.nan_blocks:
            self.store.clear_blocks(self.stream.nan_blocks)
            self.stream.nan_blocks.clear()

    def _decode_pass(self, batch: MicroBatch) -> None:
        self._take_held(batch)
        if self.stream.nan_blocks:  # before a pass ahead that reads who has them now
            self._clear_nan(batch)
        if self.ahead is not None:
            self._early = self.ahead.take(self.stream, batch)
            if self._early is not None:
                return
        step = self.steps.decode(self.stream, batch)
        with self.trace.working("decode", batch.size, tokens=len(batch.live)):
            self._run_rows("decode", step, batch)

    def _run_rows(self, phase: str, step: Step, batch: MicroBatch) -> None:
        """Rows whose pass raises are given up; the others pass as if those had been sound."""
        step.hidden = self._hidden
        live, rows = set(batch.live or batch.slots), self.stream.slots.sequences
        keys = [rows[slot].key if slot in live else None for slot in batch.slots]
        self._hidden, self._logits = self.passes.run_rows(phase, step, keys)

    def _give_up(self, batch: MicroBatch, error: Exception) -> None:
        """One row, longer than was planned for, and no memory for it."""
        tokens = self._count_row_tokens(batch)
        self.splitter.drop_row("prefill", tokens)
        self.faults.note(self.stream.slots.sequences[batch.slots[0]].key, "prefill", error, out_of_memory=True)
        self._hidden, self._logits = self.passes.fill_with_nan(1, tokens)

    def _score(self, batch: MicroBatch) -> None:
        rows = [self.stream.slots.sequences[slot] for slot in batch.slots]
        with self.trace.working("score", batch.size):
            finish = score_rows(self.scorer, rows, self._hidden, self._logits)
        self._hidden = self._logits = None
        self._record(batch, [0] * batch.size, finish)

    def _sample(self, batch: MicroBatch) -> None:
        self._take_held(batch)
        self._read_tokens()
        if self.scorer is not None:
            self._score(batch)
            return
        if not batch.live:  # a chunk that is not the last of its prompt
            self._hidden = self._logits = None
            return
        table, early = self.stream.slots, self._early
        if self.ahead is not None and early is None:
            early = self.ahead.choose(self.stream, batch, self._hidden, self._logits)
        if early is not None:
            self._hidden = None
            self.ahead.launch_next(self.stream)
            with self.trace.waiting("tokens", batch.size):
                chosen = early.read(batch.live)
        else:
            with self.trace.working("sample", batch.size):
                found = self.chooser.choose_rows(table, batch, self._hidden, self._logits)
                if self.ahead is not None:
                    self.ahead.keep_tokens(batch.live, found[0])
                if not self._reads_late:
                    chosen = _read_chosen(HostCopy(found))
            if self._reads_late:
                self._unread = batch, HostCopy(found)
                self._hidden = self._logits = None
                return
        self._hidden = self._logits = self._early = None
        self._record(batch, *self.chooser.judge(table, batch, chosen))

    def _read_tokens(self) -> None:
        """Those of the micro-batch before, while the device runs what was launched behind it. Whatever needs them has
        them read first."""
        if self._unread is None:
            return
        (batch, copy), self._unread = self._unread, None
        with self.trace.waiting("tokens", batch.size):
            chosen = _read_chosen(copy)
        self._record(batch, *self.chooser.judge(self.stream.slots, batch, chosen))

    def _record(self, batch: MicroBatch, tokens: list[int], finish: list[int]) -> None:
        """The last stage's tokens, here and on all others."""
        self.tokens.send(torch.tensor(tokens), torch.tensor(finish))
        self.stream.record(batch, tokens, finish)

    def _wait_tokens(self, slots: list[int]) -> None:
        if self.stream.slots.are_awaited(slots):
            self._read_tokens()
        if self.stream.slots.are_awaited(slots):
            with self.trace.waiting("tokens", len(slots)):
                while self.stream.slots.are_awaited(slots):
                    self.stream.record(*self.tokens.receive(wait=True))

    def _receive_requests(self) -> None:
        self._read_tokens()
        with self.trace.waiting("requests", 0):
            self.stream.take_requests()

    _INSTRUCTION_MAP = {  # noqa: RUF012 -- the name and the form are DeepSpeed's
        schedules.PostReceive: _post_receive,
        schedules.WaitActivation: _wait_activation,
        schedules.SendActivation: _send_activation,
        schedules.PrefillPass: _prefill_pass,
        schedules.DecodePass: _decode_pass,
        schedules.JoinedPass: _joined_pass,
        schedules.SampleTokens: _sample,
        schedules.WaitTokens: _wait_tokens,
        schedules.ReceiveRequests: _receive_requests,
    }

    def _poll_tokens(self) -> None:
        while (message := self.tokens.receive(wait=False)) is not None:
            self.stream.record(*message)

    def _count_tokens(self, batch: MicroBatch) -> int:
        """Tokens of all rows, without padding."""
        if batch.phase == "decode":
            return len(batch.live)
        rows = [self.stream.slots.sequences[slot] for slot in batch.slots]
        return sum(batch.tokens or len(row.prefill_tokens) - batch.past for row in rows)

    def _count_row_tokens(self, batch: MicroBatch) -> int:
        """Tokens of each row in the micro-batch, with padding."""
        if batch.phase == "decode":
            return 1
        longest = max(len(self.stream.slots.sequences[slot].prefill_tokens) for slot in batch.slots)
        return batch.tokens or longest - batch.past


def _read_chosen(copy: HostCopy) -> Chosen:
    return [(token, bool(sound)) for token, sound in zip(*copy.read(), strict=True)]


def quiet_deepspeed() -> None:
    """DeepSpeed reports each step of its set-up at INFO; the user asked for a batch, not for that."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
