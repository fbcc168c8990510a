"""The requests of a job: encodes them and puts them in order. Neighbours of similar length need less padding and
waiting. Imports no torch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.prompts import PreparedRequest, prepare
from ds_llmpq.batch.reader import RequestFile
from ds_llmpq.errors import UserError
from ds_llmpq.integers import round_up
from ds_llmpq.lengths.predictor import load_predictor
from ds_llmpq.lengths.records import Example, join_turns
from ds_llmpq.models.shape import read_shape
from ds_llmpq.scheduler.admission import AdmissionQueue
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.prefix import count_shared, find_shared_prefix
from ds_llmpq.serving.in_flight import build_identity, read_in_flight
from ds_llmpq.serving.job import ORDERINGS, Job
from ds_llmpq.serving.prediction import MOST_PASSES, LengthsOfStream, decode_passes
from ds_llmpq.serving.replay import Replay

_LEAST_SLOTS = 8  # with so many, one may be given up for a prefix that the plan has no room for


def order_requests(
    prepared: Sequence[PreparedRequest], ordering: str = "arrival", answer_tokens: Sequence[float] | None = None
) -> list[int]:
    """Places in `prepared` in the order in which they run. `arrival` keeps the file's order. `prompt_length` runs the
    longest prompts first, equal ones in file order: a prompt that does not fit in memory then shows at the start, and
    the last, partial batch is the cheapest. `predicted_length` runs the longest answers first, by `answer_tokens`, one
    for each request (None: its limit). `bucketed` sorts by prompt length in powers of two, then by predicted length."""
    places = range(len(prepared))
    if ordering == "arrival":
        return list(places)
    if ordering == "prompt_length":
        return sorted(places, key=lambda place: -prepared[place].prompt_tokens)
    if ordering not in ORDERINGS:
        raise UserError(f"ordering is {ordering!r} but must be one of {', '.join(ORDERINGS)}.")
    expected = answer_tokens if answer_tokens is not None else [each.max_tokens for each in prepared]
    bucketed = ordering == "bucketed"

    def key(place: int) -> tuple[int, float]:
        return (-prepared[place].prompt_tokens.bit_length() if bucketed else 0, -expected[place])

    return sorted(places, key=key)


@dataclass(frozen=True)
class PredictedAnswers:
    """For each answer, in tokens: the predicted length, and the bound for which cache is reserved, at most the
    request's limit."""

    tokens: list[float]
    bounds: list[int]


def predict_answers(prepared: list[PreparedRequest], batch: BatchConfig, model: str = "") -> PredictedAnswers:
    """Predicts with the batch's predictor; without one, each request's limit. `model` answers requests that name none.

    In a replay, limits do not cut predictions: a trace's limits are the lengths that its answers had, which a policy
    that predicts must not see.
    """
    limits = [each.max_tokens for each in prepared]
    if batch.predictor is None:
        return PredictedAnswers([float(limit) for limit in limits], limits)
    found = load_predictor(Path(batch.predictor)).predict([_example(each, model) for each in prepared])
    tokens = found.tokens.tolist()
    if batch.replay is None:
        tokens = [min(value, limit) for value, limit in zip(tokens, limits, strict=True)]
    if batch.admission == "worst_case":
        return PredictedAnswers(tokens, limits)
    bounds = found.bounds[batch.admission].tolist()
    return PredictedAnswers(
        tokens, [max(1, min(ceil(value), limit)) for value, limit in zip(bounds, limits, strict=True)]
    )


def _example(prepared: PreparedRequest, model: str) -> Example:
    """A request in the form of the predictor's training data."""
    request = prepared.request
    if isinstance(request.prompt, str):
        text = request.prompt
    elif request.is_chat:
        text = join_turns(request.prompt)
    else:
        text = " ".join(map(str, request.prompt))
    return Example(text, None, request.model or model, prepared.prompt_tokens)


class JobRequests:
    """The requests of a job that have no result yet; those that an earlier attempt has begun come first.

    `prepared`: in this order. `errors`: rows that cannot run. `begun`: tokens generated earlier, by a request's number
    in the input; `begun_at`: the same by its place in `prepared`, which is the engine's key. `prefix`: the tokens with
    which most prompts begin, computed once; () if there are none. `alive()` is called while nothing else happens.
    """

    def __init__(
        self, job: Job, file: RequestFile, finished: Mapping[str, Any], tokenizer: Any, alive: Callable[[], None]
    ):
        self.job = job
        self.identity = build_identity(file.sha256, job.plan, job.batch)
        self._alive = alive
        self._shape = read_shape(job.model_path)
        self.prepared, self.errors = prepare(
            (request for request in file.requests if request.custom_id not in finished),
            tokenizer,
            context_tokens=self._shape.max_positions or job.plan.cache_positions,
            capacity_tokens=job.plan.cache_positions,
            vocabulary_size=self._shape.vocab,
            progress=alive,
        )
        self.begun = self._read_begun()
        self._order()
        self.prefix, row_positions = self._choose_prefix()
        if self.prefix and job.batch.order != "arrival":
            self._join_sharing()
        self.begun_at = {
            place: self.begun[each.request.index]
            for place, each in enumerate(self.prepared)
            if each.request.index in self.begun
        }
        self._shared = self._count_shared(self.prefix)
        self.admission = self._build_admission(row_positions)
        self._replay: Replay | None = None

    @property
    def keeps_tokens(self) -> bool:
        """Whether tokens in flight are of use to a later attempt. Not if results must be batch-invariant, because a row
        that resumes computes its tokens by prefill instead of decode; nor without a journal, as nothing resumes."""
        return self.job.supervised and not self.job.engine.batch_invariant

    def choose_source(self, room: Callable[[], int | None]) -> AdmissionQueue | Replay:
        """The source of the engine's groups: all requests at once, or a replay of their arrivals. `room()`: slots of
        the engine that are free now, None between streams."""
        if self.job.batch.replay is None:
            return self.admission
        self._replay = Replay(
            self.prepared,
            self.admission.choose_replay_shape(),
            self.job.plan,
            self.job.batch.policy,
            self._expected_tokens,
            room,
            self._alive,
            begun=self.begun_at,
        )
        return self._replay

    def drop_prefix(self) -> None:
        """No stage holds it: all requests need slots for whole prompts. To be called before the first is handed out."""
        self.prefix, self._shared, stopped = (), self._count_shared(()), self.admission.stopped
        self.admission = self._build_admission(self._count_whole())
        self.admission.stopped = stopped

    def end(self, place: int) -> None:
        """The request's last token is known."""
        if self._replay is not None:
            self._replay.end(place)

    def stop(self) -> None:
        """Starts nothing new. A signal calls this, so it only sets what is checked later."""
        self.admission.stop()
        if self._replay is not None:
            self._replay.stop()

    def expect_streams(self) -> list[LengthsOfStream]:
        """Streams with answers of the predicted lengths; none in a replay, or if some requests have begun."""
        if self._replay or self.begun_at:
            return []
        lengths = [
            (each.prompt_tokens, max(1, round(tokens)))
            for each, tokens in zip(self.prepared, self._expected_tokens, strict=True)
        ]
        shared, streams = self._shared, self.admission.streams(range(len(lengths)))
        most = [each.sequence_tokens for each in self.prepared]
        return [
            (slots, [lengths[i] for i in part], [shared[i] for i in part], [most[i] for i in part])
            for slots, part in streams
        ]

    def report(self, limits: MicroBatchLimits, answer_tokens: Sequence[int]) -> dict[str, Any]:
        """The part of metrics.json on the requests: decode passes in this order, and those that the same answers would
        have needed in arrival order. Both are counted, not timed. `answer_tokens`: the lengths that answers had."""
        kept = {"rows": len(self.begun_at), "tokens": sum(map(len, self.begun_at.values()))}
        found: dict[str, Any] = {"gone_on_from": kept | {"source": "counted"}}
        if self._replay is not None:
            return found | {"replay": self._replay.report()}
        places = range(len(self.prepared))
        came = sorted(places, key=lambda place: self.prepared[place].request.index)
        found["order"] = {
            "order": self.job.batch.order,
            "admission": self.job.batch.admission,
            "requeued": self.admission.requeued,
            "decode_passes": self._count_passes(limits, answer_tokens, places),
            "decode_passes_in_arrival_order": self._count_passes(limits, answer_tokens, came),
            "source": "counted",
        }
        return found

    def _read_begun(self) -> dict[int, list[int]]:
        """Tokens that an earlier attempt left for requests without a result, by their number in the input."""
        if not self.keeps_tokens:
            return {}
        most = {each.request.index: each.max_tokens for each in self.prepared}
        return {
            index: tokens
            for index, tokens in read_in_flight(Path(self.job.output), self.identity).items()
            if len(tokens) < most.get(index, 0) and max(tokens) < self._shape.vocab
        }

    def _order(self) -> None:
        """Sorts the requests, with the tokens expected and the cache positions reserved for each one's answer."""
        batch = self.job.batch
        answers = predict_answers(self.prepared, batch, Path(self.job.model_path).name)
        order = order_requests(self.prepared, batch.order, answers.tokens)
        order = sorted(order, key=lambda place: self.prepared[place].request.index not in self.begun)
        self._expected_tokens, self._bounds = answers.tokens, answers.bounds
        self._arrange(order)

    def _join_sharing(self) -> None:
        """Of as many neighbours as there are slots, those with the prefix run first: a prefill pass takes either kind
        alone, so each change between them would end one."""
        shared, slots = self._count_shared(self.prefix), self.job.plan.workload.sequences

        def key(place: int) -> tuple[bool, int, bool]:
            return self.prepared[place].request.index not in self.begun, place // slots, not shared[place]

        self._arrange(sorted(range(len(shared)), key=key))

    def _arrange(self, order: Sequence[int]) -> None:
        self.prepared, self._expected_tokens, self._bounds = (
            [values[place] for place in order] for values in (self.prepared, self._expected_tokens, self._bounds)
        )

    def _choose_prefix(self) -> tuple[tuple[int, ...], int]:
        """The prefix, and the positions of a slot. () where sharing does not pay or there is no room to hold it."""
        plan, block, whole = self.job.plan, self.job.plan.cache_block, self._count_whole()
        if not self.job.engine.shares_prefix or not self._shape.spec.splits_prompts:
            return (), whole
        prompts = [each.prompt_ids for each in self.prepared]
        prefix = find_shared_prefix(prompts, plan.workload.prompt_tokens, block)
        if not prefix:
            return (), whole
        pairs = zip(self.prepared, self._count_shared(prefix), strict=True)
        longest = max(round_up(each.sequence_tokens - shared, block) for each, shared in pairs)
        sequences, room = plan.workload.sequences, plan.cache_positions - len(prefix)
        even = room // sequences // block * block  # at least as planned, unless the prefix is longer than that
        if longest <= room and plan.is_paged:
            return prefix, whole
        if longest <= room and even >= min(longest, plan.row_positions):
            return prefix, min(even, plan.row_positions)
        if longest > room or sequences < _LEAST_SLOTS:
            return (), whole
        return prefix, plan.row_positions  # in fewer slots

    def _count_whole(self) -> int:
        """Positions of a slot that holds prompts from their first token on, as planned."""
        return replace(self.job.plan.workload, shared_tokens=0).row_positions(self.job.plan.cache_block)

    def _build_admission(self, row_positions: int) -> AdmissionQueue:
        plan, engine = self.job.plan, self.job.engine
        return AdmissionQueue(
            self.prepared,
            self._bounds,
            plan.workload.sequences,
            row_positions,
            engine.refill,
            plan.micro_batch.decode if engine.batch_invariant else 1,
            plan.cache_block,
            self.begun_at,
            plan.cache_positions - len(self.prefix),
            self._shared,
            plan.is_paged,
        )

    def _count_passes(self, limits: MicroBatchLimits, answer_tokens: Sequence[int], order: Sequence[int]) -> int | None:
        """None if counting them would take long."""
        lengths = [(each.prompt_tokens, tokens) for each, tokens in zip(self.prepared, answer_tokens, strict=True)]
        if sum(answer_tokens) / limits.decode_rows > MOST_PASSES:
            return None
        shared, streams = self._shared, self.admission.streams(order)
        most = [each.sequence_tokens for each in self.prepared]
        return sum(
            decode_passes([lengths[i] for i in part], slots, limits, [shared[i] for i in part], [most[i] for i in part])
            for slots, part in streams
        )

    def _count_shared(self, prefix: tuple[int, ...]) -> list[int]:
        """Of each prompt, the tokens that are neither computed nor stored in its slot."""
        ids = array("i", prefix)
        return [count_shared(each.prompt_ids, ids) for each in self.prepared]
