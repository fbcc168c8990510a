"""When a row ends, as the engine asks on the last stage: end-of-sequence tokens, stop strings, max_tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_llmpq.batch.text import GenerationState
from ds_llmpq.engine.sequences import Finish
from ds_llmpq.engine.wave import WaveRow

_FINISH = {None: Finish.RUNNING, "stop": Finish.STOP, "length": Finish.LENGTH}


class TextStopRule:
    """Implements the engine's `StopRule` with one `GenerationState` a slot."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int]):
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._states: dict[int, GenerationState] = {}

    def begin(self, slot: int, row: WaveRow) -> None:
        self._states[slot] = self.state(row)
        for token in row.generated:
            self._states[slot].push(token)

    def __call__(self, slot: int, token: int, generated: int) -> Finish:
        return _FINISH[self._states[slot].push(token)]

    def state(self, row: WaveRow) -> GenerationState:
        return GenerationState(
            self.tokenizer,
            max_tokens=row.max_tokens,
            stops=row.stop,
            eos_token_ids=self.eos_token_ids,
            ignore_eos=row.ignore_eos,
        )

    def text(self, row: WaveRow, tokens: list[int]) -> str:
        """The text of a finished row: without the end-of-sequence token, cut before a stop string."""
        state = self.state(row)
        for token in tokens:
            state.push(token)
        return state.text


def eos_token_ids(model_path: str | Path, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence tokens of a checkpoint: generation_config.json, config.json and the tokenizer together."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
