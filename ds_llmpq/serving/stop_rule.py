"""When a row ends, as the engine asks on the last stage: end-of-sequence tokens, stop strings, max_tokens."""

from __future__ import annotations

from collections import abc
from pathlib import Path
from typing import Any

from ds_llmpq.batch.detokenizer import GenerationState
from ds_llmpq.models.generation import load_generation
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.slot_table import Finish

_FINISH = {None: Finish.RUNNING, "stop": Finish.STOP, "length": Finish.LENGTH}


class TextStopRule:
    """Implements the engine's `StopRule` with one `GenerationState` a slot. `stops`: strings that end every row, beside
    its own."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], stops: abc.Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.stops = tuple(stops)
        self._states: dict[int, GenerationState] = {}

    def begin(self, slot: int, row: Sequence) -> None:
        self._states[slot] = self.state(row)
        for token in row.generated:
            self._states[slot].push(token)

    def __call__(self, slot: int, token: int, generated: int) -> Finish:
        return _FINISH[self._states[slot].push(token)]

    def state(self, row: Sequence) -> GenerationState:
        return GenerationState(
            self.tokenizer,
            max_tokens=row.max_tokens,
            stops=(*row.sampling.stop, *self.stops),
            eos_token_ids=self.eos_token_ids,
            ignore_eos=row.sampling.ignore_eos,
        )

    def text(self, row: Sequence, tokens: list[int]) -> str:
        """The text of a finished row: without the end-of-sequence token, cut before a stop string."""
        state = self.state(row)
        for token in tokens:
            state.push(token)
        return state.text


def build_stop_rule(model_path: str | Path, tokenizer: Any) -> TextStopRule:
    """A checkpoint's end-of-sequence tokens and stop strings, as `generate` has them; the tokenizer's end token where
    its configuration files name none. `UserError`: files that cannot be."""
    defaults = load_generation(model_path)
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return TextStopRule(tokenizer, frozenset(defaults.eos_token_ids or own), defaults.stop_strings)
