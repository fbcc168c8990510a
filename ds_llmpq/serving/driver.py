"""Serving a job on one rank. Follow a request: read -> encode -> group -> pipeline -> text -> results.jsonl.

Rank 0, the driver, does all but the pipeline; the other ranks only run their stage.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ds_llmpq.batch.detokenizer import TextStopRule
from ds_llmpq.batch.prompts import PreparedRequest, prepare
from ds_llmpq.batch.reader import RequestFile, read_requests
from ds_llmpq.batch.request import RowError
from ds_llmpq.batch.results import Result, ResultWriter
from ds_llmpq.engine.session import (
    Session,
    count_cache_positions,
    count_prefix_positions,
    count_row_positions,
    find_cache_block,
)
from ds_llmpq.engine.stage_run.faults import Fault, describe_error
from ds_llmpq.engine.trace import build_chrome_events, format_trace
from ds_llmpq.files import write_json, write_whole
from ds_llmpq.integers import round_up
from ds_llmpq.launch.heartbeat import Heartbeat, drain_on_signal
from ds_llmpq.launch.progress import ProgressBar, ProgressLines
from ds_llmpq.models.shape import read_shape
from ds_llmpq.scheduler.admission import AdmissionQueue
from ds_llmpq.scheduler.prefix import count_shared, find_shared_prefix
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import OnTokens
from ds_llmpq.serving import metrics
from ds_llmpq.serving.in_flight import InFlight, build_identity, read_in_flight
from ds_llmpq.serving.job import Job, check_input
from ds_llmpq.serving.ordering import order_requests, predict_answers
from ds_llmpq.serving.prediction import (
    MOST_PASSES,
    LengthsOfStream,
    decode_passes,
    name_stages,
    simulate_streams,
    write_predicted_trace,
)
from ds_llmpq.serving.replay import Replay, replay_shape

_LEAST_SLOTS = 8  # of which one may be given for a prefix that the plan has no room for
_REASON = {Finish.STOP: "stop", Finish.LENGTH: "length"}


class Driver:
    """Rank 0's side of a job: requests in, rows out as they finish, counts and times."""

    def __init__(self, job: Job, rule: TextStopRule, heartbeat: Heartbeat):
        self.job = job
        self.heartbeat = heartbeat
        self.rule = rule
        self.progress = ProgressLines() if job.supervised else ProgressBar()
        self.started = time.perf_counter()
        file = read_requests(job.input, job.batch)
        check_input(job, file.sha256)
        self.total = file.total
        name, ids = Path(job.model_path).name, {request.custom_id for request in file.requests}
        # started by hand it has no journal that would say of what the results are
        self.writer = ResultWriter(job.output, model=name, total=file.total, resume=job.supervised, among=ids)
        self.prepared, errors = self._prepare(file)
        identity = build_identity(file.sha256, job.plan, job.batch)
        begun = self._begun_before(identity)
        bounds = self._order(begun)
        self.in_flight = InFlight(Path(job.output), identity, begun) if self._keeps_tokens() else None
        # by place, as the admission queue knows them
        self._begun = {
            place: begun[each.request.index] for place, each in enumerate(self.prepared) if each.request.index in begun
        }
        self.prefix = self._choose_prefix()
        self.admission = self._admission_queue(bounds)
        self.replay: Replay | None = None
        drain_on_signal(self.stop)
        for error in chain(file.errors, errors):
            self.writer.write_error(error)
        self.tokens = 0
        self._loaded_layers = 0
        self._answer_tokens = [0] * len(self.prepared)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.close()
        self.writer.close()
        if self.in_flight is not None:
            self.in_flight.close()

    def stop(self) -> None:
        """Begins nothing new; called by a signal, so it only sets what is looked at later."""
        self.admission.stop()
        if self.replay is not None:
            self.replay.stop()

    def loading(self, name: str) -> None:
        self.heartbeat.beat()
        self._loaded_layers += 1
        first, last = self.job.plan.stages[0].layers
        self.progress.show("load", self._loaded_layers, max(self._loaded_layers, last - first + 1))

    def begin_serving(self) -> None:
        self.serving_started = time.perf_counter()
        self.progress.show("prompts", self._done(), self.total)

    @property
    def on_tokens(self) -> OnTokens | None:
        """Keeps the tokens of rows that go on; None where nobody would go on from them."""
        if self.in_flight is None:
            return None
        add, indices = self.in_flight.add, [each.request.index for each in self.prepared]
        return lambda keys, tokens: add([indices[key] for key in keys], tokens)

    def write_result(self, row: Sequence, tokens: list[int], finish: Finish) -> None:
        """Writes one request's result: called when its last token is known."""
        if finish is Finish.PREEMPTED:
            self.admission.requeue(row, tokens)
            return
        request = self.prepared[row.key]
        self.tokens += len(tokens) - len(self._begun.get(row.key, ()))
        self._answer_tokens[row.key] = len(tokens)
        if self.replay is not None:
            self.replay.end(row.key)
        if finish is Finish.NAN_LOGITS:
            return
        try:
            text = self.rule.text(row, tokens)
        except Exception as error:
            self.write_error(row, Fault(0, "decoding its tokens", type(error).__name__, describe_error(error)))
            return
        ids = (request.prompt_ids, tokens) if request.request.return_token_ids else (None, None)
        self.writer.write_result(
            Result(request.request, request.prompt_tokens, len(tokens), text, _REASON[finish], *ids)
        )
        if self.in_flight is not None:
            self.in_flight.end(request.request.index)
        self._show()

    def write_error(self, row: Sequence, fault: Fault | None) -> None:
        """Writes one request's error: called when it is known why it was given up, after it has finished."""
        request = self.prepared[row.key].request
        if self.in_flight is not None:
            self.in_flight.begin_anew(request.index)
        if fault is not None and fault.out_of_memory and self._begun.pop(row.key, None):
            self.admission.requeue(row, ())  # its prompt alone is shorter
            return
        self.writer.write_error(RowError(request.line, request.custom_id, *_reason(fault)))
        self._show()

    def _show(self) -> None:
        seconds = time.perf_counter() - self.serving_started
        self.progress.show("prompts", self._done(), self.total, f"{self.tokens / seconds:.0f} tokens/s")

    def conclude(self, session: Session, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes metrics.json, trace.json and predicted_trace.json: the plan's times for what came."""
        self.writer.sync()  # or says that the results are gone
        folder = Path(self.job.output)
        events = chain.from_iterable([build_chrome_events(report.pop("trace")) for report in reports])
        plan, streams, limits = self.job.plan, session.engine.stream_times, session.limits
        lengths = [(stream.slots, stream.lengths, stream.lengths.shared) for stream in streams]
        simulated = simulate_streams(plan, lengths, limits)
        expected = [] if self.replay or self._begun else self._expected_streams()
        summary = metrics.summarize(
            plan,
            self.writer.counts,
            streams,
            reports,
            startup_seconds=self.serving_started - self.started,
            simulated=simulated,
            expected=metrics.expect(plan, expected, limits, len(self.prefix)),
        )
        kept = {"rows": len(self._begun), "tokens": sum(map(len, self._begun.values()))}
        summary["gone_on_from"] = kept | {"source": "counted"}
        if self.replay is None:
            summary["order"] = self._order_report(session)
        else:
            summary["replay"] = self.replay.report()
        write_json(folder / "metrics.json", summary)
        write_whole(folder / "trace.json", format_trace(chain(name_stages(plan), events)))
        if simulated:
            write_predicted_trace(plan, simulated, folder)
        return summary

    def _prepare(self, file: RequestFile) -> tuple[list[PreparedRequest], list[RowError]]:
        shape, positions = read_shape(self.job.model_path), count_cache_positions(self.job.plan)
        return prepare(
            (request for request in file.requests if request.custom_id not in self.writer.finished),
            self.rule.tokenizer,
            context_tokens=shape.max_positions or positions,
            capacity_tokens=positions,
            vocabulary_size=shape.vocab,
            progress=self.heartbeat.beat,
        )

    def _keeps_tokens(self) -> bool:
        """What a row goes on from is computed by prefill instead of decode, in other shapes; and only a run with a
        journal is gone on with."""
        return self.job.supervised and not self.job.engine.batch_invariant

    def _begun_before(self, identity: str) -> dict[int, list[int]]:
        """Tokens that a former attempt left of requests without a result, by their number in the input."""
        if not self._keeps_tokens():
            return {}
        found, vocabulary = read_in_flight(Path(self.job.output), identity), read_shape(self.job.model_path).vocab
        most = {each.request.index: each.max_tokens for each in self.prepared}
        return {
            index: tokens
            for index, tokens in found.items()
            if len(tokens) < most.get(index, 0) and max(tokens) < vocabulary
        }

    def _order(self, begun: Mapping[int, abc.Sequence[int]]) -> list[int]:
        """Sorts the prepared requests, those that have begun first; returns the cache positions reserved for each one's
        answer."""
        batch = self.job.batch
        answers = predict_answers(self.prepared, batch, Path(self.job.model_path).name)
        order = order_requests(self.prepared, batch.order, answers.tokens)
        order = sorted(order, key=lambda place: self.prepared[place].request.index not in begun)
        self.prepared = [self.prepared[place] for place in order]
        self._predicted_tokens = [answers.tokens[place] for place in order]
        return [answers.bounds[place] for place in order]

    def _choose_prefix(self) -> tuple[int, ...]:
        """What most prompts begin with and is to be computed once, if there is room to keep it; () if nothing is."""
        plan = self.job.plan
        rotary = read_shape(self.job.model_path).spec.rotary
        # a row's arithmetic is the same in any company; angles that change with a row's length fit no other's prefix
        if not self.job.engine.shares_prefix or any(kind.kind == "longrope" for _, kind in rotary):
            return ()
        prompts, block = [each.prompt_ids for each in self.prepared], find_cache_block(plan)
        prefix = find_shared_prefix(prompts, plan.workload.prompt_tokens, block)
        longest = round_up(max((each.sequence_tokens for each in self.prepared), default=0), block)
        taken = self._count_taken(prefix)
        if longest > count_cache_positions(plan) - taken or (taken and plan.workload.sequences < _LEAST_SLOTS):
            return ()
        return prefix

    def _count_taken(self, prefix: tuple[int, ...]) -> int:
        """Positions of the slots' that the prefix takes."""
        return max(0, len(prefix) - count_prefix_positions(self.job.plan))

    def _admission_queue(self, bounds: list[int]) -> AdmissionQueue:
        plan, engine = self.job.plan, self.job.engine
        return AdmissionQueue(
            self.prepared,
            bounds,
            plan.workload.sequences,
            count_row_positions(plan),
            engine.refill,
            plan.micro_batch.decode if engine.batch_invariant else 1,
            find_cache_block(plan),
            self._begun,
            self._count_taken(self.prefix),
        )

    def source(self, session: Session) -> AdmissionQueue | Replay:
        """Where the engine's groups come from: all requests at once, or a replay of when they came."""
        if self.job.batch.replay is None:
            return self.admission

        def room() -> int | None:
            stream = session.engine.stream
            return None if stream is None else stream.shape[0] - stream.scheduler.occupied

        self.replay = Replay(
            self.prepared,
            replay_shape(self.admission, self.prepared),
            self.job.plan,
            self.job.batch.policy,
            self._predicted_tokens,
            room,
            self.heartbeat.beat,
            begun=self._begun,
        )
        return self.replay

    def _expected_streams(self) -> list[LengthsOfStream]:
        """Streams with answers of the predicted lengths."""
        lengths = [
            (each.prompt_tokens, max(1, round(tokens)))
            for each, tokens in zip(self.prepared, self._predicted_tokens, strict=True)
        ]
        shared = [count_shared(tuple(each.prompt_ids), self.prefix) for each in self.prepared]
        streams = self.admission.streams(range(len(lengths)))
        return [(slots, [lengths[i] for i in part], [shared[i] for i in part]) for slots, part in streams]

    def _order_report(self, session: Session) -> dict[str, Any]:
        """Decode passes that this order led to, and what the same answers would have needed in arrival order. Both are
        counted from the answers, not timed."""
        came = sorted(range(len(self.prepared)), key=lambda place: self.prepared[place].request.index)
        return {
            "order": self.job.batch.order,
            "admission": self.job.batch.admission,
            "requeued": self.admission.requeued,
            "decode_passes": self._passes(session, range(len(self.prepared))),
            "decode_passes_in_arrival_order": self._passes(session, came),
            "source": "counted",
        }

    def _passes(self, session: Session, order: abc.Sequence[int]) -> int | None:
        """None where counting them would take long."""
        lengths = [(self.prepared[i].prompt_tokens, self._answer_tokens[i]) for i in range(len(self.prepared))]
        if sum(answer for _, answer in lengths) / session.limits.decode_rows > MOST_PASSES:
            return None
        streams = self.admission.streams(order)
        return sum(decode_passes([lengths[i] for i in part], slots, session.limits) for slots, part in streams)

    def _done(self) -> int:
        return self.writer.counts["completed"] + self.writer.counts["failed"]


def _reason(fault: Fault | None) -> tuple[str, str]:
    """Code and message of the error row."""
    if fault is None:
        return "nan_logits", (
            "the model's logits were not numbers for this prompt; try another compute dtype or bit width."
        )
    where = f"stage {fault.stage}, {fault.phase}: {fault.kind}: {fault.message}"
    if fault.out_of_memory:
        return "out_of_memory", f"no memory for a prompt of this length ({where}); plan for longer prompts."
    return "execution_error", f"the model could not run this row ({where}); the other rows were not harmed."
