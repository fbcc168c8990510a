"""What a checkpoint's generation_config.json asks of every answer, as transformers' `generate` takes it. No torch.

Each key is honoured, left to the rows and `batch.*`, or named as not honoured; `docs/batch_files.md` has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import read_json
from ds_llmpq.models.description import read_config, read_description
from ds_llmpq.models.families import find_family
from ds_llmpq.validation import Plain, validate

NAME = "generation_config.json"
_MOST_BYTES = 16 << 20
_MOST_TOKEN = 2**31 - 1
Sequence = tuple[int, ...]  # of token ids


@dataclass(frozen=True)
class Generation:
    """Defaults of a checkpoint, in transformers' words and units; a default value is one without effect.

    `repetition_penalty`, `min_p` and `min_new_tokens` hold for rows that give none of their own. The truncations of the
    distribution (`min_p` to `eta_cutoff`) act where a row samples. Token ids are below the vocabulary's size.
    `left_out`: keys of the file that are not honoured, with the reason.
    """

    eos_token_ids: Sequence = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[Sequence, float], ...] = ()
    bad_words_ids: tuple[Sequence, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Sequence = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: Sequence = ()
    begin_suppress_tokens: Sequence = ()
    top_h: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    stop_strings: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def effective(self) -> dict[str, Any]:
        """The keys that have an effect, the end-of-sequence tokens aside."""
        plain = [entry for entry in fields(self) if entry.name not in ("eos_token_ids", "left_out")]
        return {entry.name: value for entry in plain if (value := getattr(self, entry.name)) != entry.default}

    def lines(self) -> list[str]:
        """What a user should know of it: at most one line of what is taken and one of what is not."""
        said = []
        if self.effective:
            listed = ", ".join(f"{name} {quote(_as_lists(value))}" for name, value in self.effective.items())
            said.append(f"defaults from {NAME}: {listed}")
        if self.left_out:
            by_reason: dict[str, list[str]] = {}
            for key, reason in self.left_out:
                by_reason.setdefault(reason, []).append(key)
            listed = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in by_reason.items())
            said.append(f"not taken from {NAME}: {listed}")
        return said


def load_generation(path: str | Path) -> Generation:
    """The defaults of the checkpoint in folder `path`. `UserError` as in `read_generation` and `read_description`."""
    return read_generation(path, read_config(path), read_description(path).spec.vocab)


def read_generation(path: str | Path, config: Mapping[str, Any], vocabulary: int) -> Generation:
    """The defaults in the folder `path`; `config` is its config.json. `UserError`: a file that is no JSON object, or a
    key whose value cannot be."""
    file = Path(path) / NAME
    given = _read(file) if file.exists() or file.is_symlink() else None
    values = {key: value for key, value in (given or {}).items() if value is not None}
    chosen = {}
    for key, read in _HONOURED.items():
        if key in values:
            chosen[key] = read(_Value(file, key, values[key], vocabulary))
    eos, ending = _choose_eos(file, given, config)
    left_out = [(f"{key} {quote(values[key])}", why) for key, why in _explain_left_out(values).items()]
    return Generation(eos_token_ids=eos, left_out=(*left_out, *ending), **chosen)


def _read(file: Path) -> dict[str, Any]:
    what, remedy = "Generation defaults", "fetch the file again, or remove it"
    return validate(Plain, read_json(file, what, remedy, _MOST_BYTES), f"{what} {file}", remedy)


def _choose_eos(
    file: Path, given: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> tuple[Sequence, list[tuple[str, str]]]:
    """As transformers has it: of generation_config.json where there is one, else of config.json. A file that names none
    would never end an answer; there config.json has a word."""
    if given is not None and given.get("eos_token_id") is not None:
        return _Value(file, "eos_token_id", given["eos_token_id"], None).tokens(), []
    family = find_family(config.get("model_type"))
    named = config.get("eos_token_id", family.eos_token_id if family else None)
    found = () if named is None else _Value(file.with_name("config.json"), "eos_token_id", named, None).tokens()
    if given is None or not found:
        return found, []
    return found, [("eos_token_id null", f"answers end at config.json's {quote(_as_lists(found))}")]


class _Value:
    """One key's value and what it may be."""

    def __init__(self, file: Path, key: str, value: Any, vocabulary: int | None):
        self.file, self.key, self.value, self.vocabulary = file, key, value, vocabulary

    def error(self, bound: str) -> UserError:
        return UserError(
            f"{self.file} has {self.key}={quote(self.value)}; it must be {bound}; mend or remove that key."
        )

    def number(self, low: float, high: float, bound: str) -> float:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(bound)
        return float(value)

    def count(self) -> int:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKEN:
            raise self.error(f"a whole number from 0 to {_MOST_TOKEN}")
        return value

    def tokens(self, value: Any = None, least: int = 0) -> Sequence:
        """A token id or a list of them."""
        value = self.value if value is None else value
        listed = value if isinstance(value, list) else [value]
        whole = all(isinstance(token, int) and not isinstance(token, bool) for token in listed)
        if not whole or len(listed) < least or not all(abs(token) <= _MOST_TOKEN for token in listed):
            raise self.error("a token id or a list of token ids")
        return tuple(listed)

    def known_tokens(self, value: Any = None) -> Sequence:
        """Ids that the model has, each of them."""
        found = self.tokens(value, least=1)
        if not all(0 <= token < self.vocabulary for token in found):
            raise self.error(f"of token ids from 0 to {self.vocabulary - 1}")
        return found

    def suppressed(self) -> Sequence:
        """Ids that the model lacks cannot be generated anyway."""
        return tuple(token for token in self.tokens() if 0 <= token < self.vocabulary)

    def words(self) -> tuple[Sequence, ...]:
        if not isinstance(self.value, list) or not all(isinstance(word, list) and word for word in self.value):
            raise self.error("a list of lists of token ids")
        return tuple(self.known_tokens(word) for word in self.value)

    def biases(self) -> tuple[tuple[Sequence, float], ...]:
        pairs = self.value if isinstance(self.value, list) else [None]
        if not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and _finite(pair[1])
            for pair in pairs
        ):
            raise self.error("a list of pairs of a list of token ids and a number")
        return tuple({self.known_tokens(words): float(bias) for words, bias in pairs}.items())

    def decay(self) -> tuple[int, float]:
        value = self.value
        pair = value if isinstance(value, list) and len(value) == 2 else [None, None]
        if not _finite(pair[0]) or pair[0] != int(pair[0]) or not _finite(pair[1]) or pair[1] <= 0:
            raise self.error("a pair of a whole number of tokens and a number above 0")
        return int(pair[0]), float(pair[1])

    def strings(self) -> tuple[str, ...]:
        listed = self.value if isinstance(self.value, list) else [self.value]
        if not all(isinstance(each, str) and each for each in listed):
            raise self.error("a string or a list of strings that are not empty")
        return tuple(listed)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_share(value: _Value) -> float:
    return value.number(0, 1, "a number from 0 to 1")


_HONOURED: dict[str, Callable[[_Value], Any]] = {
    "repetition_penalty": lambda value: value.number(1e-6, 1e6, "a number above 0"),
    "no_repeat_ngram_size": _Value.count,
    "sequence_bias": _Value.biases,
    "bad_words_ids": _Value.words,
    "min_length": _Value.count,
    "min_new_tokens": _Value.count,
    "forced_bos_token_id": lambda value: value.known_tokens([value.value])[0],
    "forced_eos_token_id": _Value.known_tokens,
    "exponential_decay_length_penalty": _Value.decay,
    "suppress_tokens": _Value.suppressed,
    "begin_suppress_tokens": _Value.suppressed,
    "top_h": lambda value: value.number(1e-9, 1, "a number above 0 and at most 1"),
    "min_p": _read_share,
    "typical_p": lambda value: value.number(1e-9, 1, "a number above 0 and at most 1"),
    "epsilon_cutoff": _read_share,
    "eta_cutoff": _read_share,
    "stop_strings": _Value.strings,
}

_BATCH = "rows and batch.* decide"
_ONE_ANSWER = "every row gets one answer, chosen token by token"
# key -> (values without effect, why it has none here); where transformers leaves answers as they are, keys are not here
_LEFT_OUT: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_sample": ((False,), _BATCH),
    "temperature": ((1.0,), _BATCH),
    "top_k": ((0, 50), _BATCH),
    "top_p": ((1.0,), _BATCH),
    "max_length": ((20,), _BATCH),
    "max_new_tokens": ((), _BATCH),
    "num_beams": ((1,), _ONE_ANSWER),
    "num_beam_groups": ((1,), _ONE_ANSWER),
    "num_return_sequences": ((1,), _ONE_ANSWER),
    "diversity_penalty": ((0.0,), _ONE_ANSWER),
    "penalty_alpha": ((0.0,), _ONE_ANSWER),
    "constraints": ((), _ONE_ANSWER),
    "force_words_ids": ((), _ONE_ANSWER),
    "dola_layers": ((), "not served"),
    "guidance_scale": ((1.0, 1), "not served"),
    "watermarking_config": ((), "not served"),
    "token_healing": ((False,), "not served"),
    "encoder_repetition_penalty": ((1.0,), "not served"),
    "encoder_no_repeat_ngram_size": ((0,), "not served"),
    "max_time": ((), "not served"),
    "remove_invalid_values": ((False,), "a row whose logits are no numbers becomes an error row"),
}


def _explain_left_out(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys whose value would change what `generate` answers, and does not here."""
    found = {key: why for key, (neutral, why) in _LEFT_OUT.items() if key in values and values[key] not in neutral}
    if values.get("cache_implementation") == "quantized":
        found["cache_implementation"] = "the cache is kept as planned"
    return found


def _as_lists(value: Any) -> Any:
    """Lists as JSON has them."""
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple) else value
