"""The steps that a micro-batch's passes are: which tokens, at which positions, with which part of the KV cache."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable

import torch

from ds_llmpq.engine.kv_cache import KVStore, NoCache
from ds_llmpq.engine.paged_cache import PagedKVStore, PagedRows
from ds_llmpq.engine.runner.host_copies import to_device
from ds_llmpq.integers import round_up
from ds_llmpq.models.step import Step
from ds_llmpq.scheduler.micro_batch import MicroBatch
from ds_llmpq.scheduler.stream import Stream

# Positions. Attention to a prefix and what follows it is plain products. In bfloat16 on CPUs, oneDNN makes kernels for
# each length that it meets, in a millisecond, so lengths are rounded up, behind the mask.
_CONTEXT_STEP = 32


class StepBuilder:
    """`is_first`: the stage takes token ids; others take hidden states. `every_position`: the head is applied to all of
    a prompt's tokens, not to the last one alone."""

    def __init__(
        self, store: KVStore | NoCache, positional: Callable[[Step], None], device: torch.device, is_first: bool,
        every_position: bool = False,
    ):  # fmt: skip
        self.store = store
        self.positional = positional
        self.device = device
        self.is_first = is_first
        self.every_position = every_position

    def prefill(self, stream: Stream, batch: MicroBatch) -> Step:
        """Prompts from where they are not computed yet, padded to the longest; or a chunk of one."""
        past, end = batch.past, batch.past + batch.tokens if batch.tokens else None
        prompts = [stream.slots.sequences[slot].prefill_tokens[past:end] for slot in batch.slots]
        longest = max(map(len, prompts))
        step = Step(
            positions=torch.arange(past, past + longest, device=self.device).expand(batch.size, longest),
            cache=self.store.prefill(batch.slots, past, stream.slots.shared[batch.slots[0]]),
            kv_tokens=past + longest,
            causal_only=not past,
            last=None if self.every_position else to_device([len(tokens) - 1 for tokens in prompts], self.device),
            prepare=self.positional,
        )
        if self.is_first:
            # padding repeats the row's own token, so a token id that yields NaN affects only rows that contain it
            padded = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in prompts]
            step.token_ids = to_device(padded, self.device)
        return step

    def decode(self, stream: Stream, batch: MicroBatch) -> Step:
        """The last token of each slot."""
        table = stream.slots
        step = self.decode_at(stream, batch, [table.position(slot) for slot in batch.live])
        if self.is_first:
            live = set(batch.live)
            # slots that go along bring a running row's token, which the model can process, or that row is given up
            along = table.generated[batch.live[0]][-1]
            tokens = [table.generated[slot][-1] if slot in live else along for slot in batch.slots]
            step.token_ids = to_device(tokens, self.device)[:, None]
        return step

    def decode_at(self, stream: Stream, batch: MicroBatch, positions: abc.Sequence[int]) -> Step:
        """A decode step without its tokens. `positions`: of the live slots' last tokens."""
        if stream.ragged or isinstance(self.store, PagedKVStore):
            return self._decode_running(stream, batch, positions)
        live = dict(zip(batch.live, positions, strict=True))
        own = [place - stream.slots.shared[slot] for slot, place in live.items()]  # places in their slots
        # how sums over the cache are grouped depends on how much of it is read
        kv_tokens = self.store.capacity if stream.batch_invariant else max(own) + 1
        # where no live row has the prefix, none attends to it
        shared = stream.slots.shared if own != [*live.values()] else [0] * len(stream.slots.shared)
        places = [
            live[slot] if slot in live else shared[slot] + self._find_unread_place(stream, slot) for slot in batch.slots
        ]
        at, of_prefix = to_device(places, self.device), None
        if any(shared):
            of_prefix = to_device([shared[slot] for slot in batch.slots], self.device)
            kv_tokens = min(round_up(kv_tokens, _CONTEXT_STEP), self.store.capacity)
        return Step(
            positions=at[:, None],
            cache=self.store.decode_slots(batch.slots, at, kv_tokens, of_prefix),
            kv_tokens=kv_tokens,
            causal_only=not stream.batch_invariant and min(own) + 1 == kv_tokens,
            shared=of_prefix,
            prepare=self.positional,
        )

    def _decode_running(self, stream: Stream, batch: MicroBatch, positions: abc.Sequence[int]) -> Step:
        """All slots of the pass are live. A row's keys are found by its block table, those of a prefix among them."""
        at, seen = to_device(positions, self.device), max(positions) + 1
        shared = [stream.slots.shared[slot] for slot in batch.slots]
        if isinstance(self.store, PagedKVStore):
            cache = self.store.decode_rows(batch.slots, positions, shared, at)
        else:
            cache = PagedRows(self.store, list(zip(batch.slots, positions, shared, strict=True)))
        return Step(
            positions=at[:, None],
            cache=cache,
            kv_tokens=seen,
            causal_only=min(positions) + 1 == seen,
            prepare=self.positional,
        )

    def _find_unread_place(self, stream: Stream, slot: int) -> int:
        """Where in its slot a slot that goes along may write: behind what its sequence's prefill has stored, where the
        sequence itself writes before it reads; what an ended one left is read by none. The same on every stage."""
        row = stream.slots.sequences[slot]
        stored = 0 if row is None else len(row.prefill_tokens) - stream.slots.shared[slot]
        return min(stored, self.store.capacity - 1)
