"""Rank 0's part of a job: reads requests, writes rows as they finish, counts and times. Other ranks only run their
stage."""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path
from typing import Any

from ds_llmpq.batch.detokenizer import TextStopRule
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import RowError
from ds_llmpq.batch.results import Result, ResultWriter
from ds_llmpq.engine.session import Session
from ds_llmpq.engine.stage_run.faults import Fault, describe_error
from ds_llmpq.engine.trace import build_chrome_events, format_trace
from ds_llmpq.files import write_json, write_whole
from ds_llmpq.launch.heartbeat import Heartbeat, drain_on_signal
from ds_llmpq.launch.progress import ProgressBar, ProgressLines
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.slot_table import Finish
from ds_llmpq.scheduler.stream import OnTokens, TakeGroup
from ds_llmpq.serving import metrics
from ds_llmpq.serving.in_flight import InFlight
from ds_llmpq.serving.job import Job, check_input
from ds_llmpq.serving.ordering import JobRequests
from ds_llmpq.serving.prediction import MOST_PASSES_OF_RUN, name_stages, simulate_streams, write_predicted_trace

_REASON = {Finish.STOP: "stop", Finish.LENGTH: "length"}


class Driver:
    """`requests` are those without a result; the engine's key of a request is its place among them."""

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
        # a rank started by hand has no journal that would say what the results were made from
        self.writer = ResultWriter(job.output, model=name, total=file.total, resume=job.supervised, among=ids)
        self.requests = requests = JobRequests(job, file, self.writer.finished, rule.tokenizer, heartbeat.beat)
        self.prepared = requests.prepared
        self.in_flight = (
            InFlight(Path(job.output), requests.identity, requests.begun) if requests.keeps_tokens else None
        )
        drain_on_signal(requests.stop)
        for error in chain(file.errors, requests.errors):
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

    def show_loading(self, name: str) -> None:
        self.heartbeat.beat()
        self._loaded_layers += 1
        first, last = self.job.plan.stages[0].layers
        self.progress.show("load", self._loaded_layers, max(self._loaded_layers, last - first + 1))

    def begin_serving(self, session: Session) -> TakeGroup:
        """Computes what prompts share. Returns the function from which the session takes its groups."""

        def room() -> int | None:
            stream = session.engine.stream
            return None if stream is None else stream.shape[0] - stream.scheduler.occupied

        self.serving_started = time.perf_counter()
        self.progress.show("prompts", self._count_done(), self.total)
        if not session.share_prefix(self.requests.prefix):
            self.requests.drop_prefix()
        return self.requests.choose_source(room).take

    @property
    def on_tokens(self) -> OnTokens | None:
        """Keeps the tokens of unfinished rows; None if no restart would resume from them."""
        if self.in_flight is None:
            return None
        add, indices = self.in_flight.add, [each.request.index for each in self.prepared]
        return lambda keys, tokens: add([indices[key] for key in keys], tokens)

    def write_result(self, row: Sequence, tokens: list[int], finish: Finish) -> None:
        """Writes a request's result, when its last token is known."""
        if finish is Finish.PREEMPTED:
            self.requests.admission.requeue(row, tokens)
            return
        request = self.prepared[row.key]
        self.tokens += len(tokens) - len(self.requests.begun_at.get(row.key, ()))
        self._answer_tokens[row.key] = len(tokens)
        self.requests.end(row.key)
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
        """Writes a request's error, after it has finished, when it is known why it was given up."""
        request = self.prepared[row.key].request
        if self.in_flight is not None:
            self.in_flight.begin_anew(request.index)
        if fault is not None and fault.out_of_memory and self.requests.begun_at.pop(row.key, None):
            self.requests.admission.requeue(row, ())  # without its tokens, the prompt is shorter
            return
        self.writer.write_error(RowError(request.line, request.custom_id, *_explain(fault)))
        self._show()

    def _show(self) -> None:
        seconds = time.perf_counter() - self.serving_started
        self.progress.show("prompts", self._count_done(), self.total, f"{self.tokens / seconds:.0f} tokens/s")

    def conclude(self, session: Session, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes metrics.json, trace.json, and predicted_trace.json with the plan's times for these requests."""
        self.writer.sync()  # fails if the results are gone
        folder = Path(self.job.output)
        events = chain.from_iterable([build_chrome_events(report.pop("trace")) for report in reports])
        plan, streams, limits = self.job.plan, session.engine.stream_times, session.limits
        lengths = [(stream.slots, stream.lengths, stream.lengths.shared, stream.lengths.most) for stream in streams]
        simulated = simulate_streams(plan, lengths, limits, MOST_PASSES_OF_RUN)
        expected = self.requests.expect_streams()
        summary = metrics.summarize(
            plan,
            self.writer.counts,
            streams,
            reports,
            startup_seconds=self.serving_started - self.started,
            simulated=simulated,
            expected=metrics.expect(plan, expected, limits, len(self.requests.prefix)),
        )
        summary |= self.requests.report(limits, self._answer_tokens)
        write_json(folder / "metrics.json", summary)
        write_whole(folder / "trace.json", format_trace(chain(name_stages(plan), events)))
        if simulated:
            write_predicted_trace(plan, simulated, folder)
        return summary

    def _count_done(self) -> int:
        return self.writer.counts["completed"] + self.writer.counts["failed"]


def _explain(fault: Fault | None) -> tuple[str, str]:
    """Code and message of the error row."""
    if fault is None:
        return "nan_logits", (
            "the model's logits were not numbers for this prompt; try another compute dtype or bit width."
        )
    where = f"stage {fault.stage}, {fault.phase}: {fault.kind}: {fault.message}"
    if fault.out_of_memory:
        return "out_of_memory", f"no memory for a prompt of this length ({where}); plan for longer prompts."
    return "execution_error", f"the model could not run this row ({where}); the other rows were not harmed."
