"""The text of a growing token sequence, and when it ends: stop strings, end-of-sequence tokens, the token limit."""

from __future__ import annotations

from collections import abc
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ds_llmpq.models.generation import load_generation
from ds_llmpq.scheduler.request_group import Sequence
from ds_llmpq.scheduler.slot_table import Finish

REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to
WINDOW_TOKENS = 16  # decoded for each new token; when it is full, half is kept as context
MAX_WINDOW_TOKENS = 64  # reached only by text without a place to cut, such as endless empty tokens


class TextState:
    """Incremental detokenization of one sequence, searched for stop strings.

    `text` equals the decoding of all tokens at once, cut before the first stop string. Without stop strings nothing is
    decoded before that; with them, each token decodes a window of at most 64. Special tokens are not part of the text,
    but a stop string that contains one is found where it was generated. A stop string may span tokens. A tail of
    replacement characters, which the next token may turn into a character, is searched once it settles.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.stopped = False
        self._searches = [_Search(tokenizer, stops)] if stops else []
        if holding := _find_special_stops(tokenizer, stops):
            self._searches.append(_SpecialSearch(tokenizer, holding))

    def push(self, token_id: int) -> bool:
        """Appends a token. Returns True once the text holds a stop string; then nothing more may be pushed."""
        self.token_ids.append(token_id)
        for search in self._searches:
            self.stopped |= search.push(token_id, self.token_ids)
        return self.stopped

    @property
    def text(self) -> str:
        if not self.stopped:
            return decode(self.tokenizer, self.token_ids)
        return min((search.cut_at_stop(self.token_ids) for search in self._searches), key=len)


class _Search:
    """Looks for stop strings in the text that a sequence's tokens decode to."""

    with_special = False

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]):
        self.tokenizer, self.stops = tokenizer, stops
        self._window = _Window(tokenizer, self.with_special)
        self._tail = ""  # settled text that may begin a stop string
        self._tail_characters = max(map(len, stops)) - 1

    def push(self, token_id: int, token_ids: list[int]) -> bool:
        """Whether the text of `token_ids`, the last of which is new, contains a stop string."""
        piece = self._window.push(token_id)
        if not piece:
            return False
        searched = self._tail + piece
        self._tail = searched[max(0, len(searched) - self._tail_characters) :]
        # on bytes that are not text the window may differ from the whole, so the whole decides
        return any(stop in searched for stop in self.stops) and self._find_first(self._decode(token_ids)) is not None

    def cut_at_stop(self, token_ids: list[int]) -> str:
        """The visible text before the first stop string, or all of it."""
        text = self._decode(token_ids)
        return text[: self._find_first(text)]

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self.tokenizer, token_ids, self.with_special)

    def _find_first(self, text: str) -> int | None:
        places = [text.find(stop) for stop in self.stops]
        return min((place for place in places if place >= 0), default=None)


class _SpecialSearch(_Search):
    """Searches the text with special tokens, for stop strings that contain one."""

    with_special = True

    def cut_at_stop(self, token_ids: list[int]) -> str:
        place = self._find_first(self._decode(token_ids))
        if place is None:
            return decode(self.tokenizer, token_ids)
        # the tokens that end before it, and the visible part of the next one
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self._decode(token_ids[:middle])) <= place else (low, middle - 1)
        rest = self._decode(token_ids[: low + 1])[len(self._decode(token_ids[:low])) : place]
        return decode(self.tokenizer, token_ids[:low]) + rest


def _find_special_stops(tokenizer: Any, stops: tuple[str, ...]) -> tuple[str, ...]:
    """The stop strings that contain the text of a special token."""
    if not stops:
        return ()
    special = [token.content for token in _list_special_tokens(tokenizer).values() if token.content]
    return tuple(stop for stop in stops if any(text in stop for text in special))


class GenerationState:
    """Stop rule of one sequence: `push` tokens until it returns a finish reason.

    `stop`: an end-of-sequence token (unless ignored) or a stop string; `length`: max_tokens. Every pushed token counts
    as generated; the end-of-sequence token that ends the sequence is not part of the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int,
        stops: tuple[str, ...],
        eos_token_ids: Collection[int],
        ignore_eos: bool,
    ):
        self.max_tokens = max_tokens
        self.finish_reason: str | None = None
        self.generated_tokens = 0
        self._ends = frozenset() if ignore_eos else frozenset(eos_token_ids)
        self._text = TextState(tokenizer, stops)

    def push(self, token_id: int) -> str | None:
        """Takes a generated token. Returns the finish reason if the sequence ends with it."""
        self.generated_tokens += 1
        if token_id in self._ends or self._text.push(token_id):
            self.finish_reason = "stop"
        elif self.generated_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason

    @property
    def text(self) -> str:
        return self._text.text


def decode(tokenizer: Any, token_ids: list[int], with_special: bool = False) -> str:
    """The text of generated tokens, with spaces as generated, and without special tokens unless asked for."""
    return tokenizer.decode(token_ids, skip_special_tokens=not with_special, clean_up_tokenization_spaces=False)


class _Window:
    """The last tokens of a sequence, decoded together, of whose text a part has settled."""

    def __init__(self, tokenizer: Any, with_special: bool = False):
        self._tokenizer, self._with_special = tokenizer, with_special
        # tokens that decoding skips must not fill the window
        self._skipped = frozenset() if with_special else frozenset(_list_special_tokens(tokenizer))
        self._ids: list[int] = []
        self._settled = 0  # characters of the window's text already returned

    def push(self, token_id: int) -> str:
        """The text that settles with this token, perhaps none."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        settled = len(text.rstrip(REPLACEMENT))
        if len(self._ids) >= MAX_WINDOW_TOKENS:
            settled = len(text)  # no text: characters have at most 4 bytes, so waiting is useless
        piece = text[self._settled : settled]
        self._settled = max(self._settled, settled)
        if len(self._ids) >= WINDOW_TOKENS:
            self._shorten(text)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, self._with_special)

    def _shorten(self, text: str) -> None:
        """Drops the older half of the tokens if the cut is between characters; of four neighbouring cuts at least one
        is. Some settled text stays as context, for decoders that strip the space of a first token."""
        half = len(self._ids) // 2
        for start in range(half, half + 4):
            rest = self._decode(self._ids[start:])
            dropped = len(text) - len(rest)
            if text.endswith(rest) and self._settled > dropped:
                self._ids, self._settled = self._ids[start:], self._settled - dropped
                return
        if len(self._ids) >= MAX_WINDOW_TOKENS:
            self._ids = self._ids[half:]
            self._settled = len(self._decode(self._ids))


def _list_special_tokens(tokenizer: Any) -> dict[int, Any]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token_id: token for token_id, token in added.items() if getattr(token, "special", False)}


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
    """With a checkpoint's end-of-sequence tokens and stop strings, as in `generate`; with the tokenizer's end token if
    its configuration files name none. `UserError`: invalid files."""
    defaults = load_generation(model_path)
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return TextStopRule(tokenizer, frozenset(defaults.eos_token_ids or own), defaults.stop_strings)
