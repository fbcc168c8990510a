"""The defaults in a checkpoint's generation_config.json, with the meaning that they have in transformers' `generate`.
No torch.

Each key is used, left to the rows and `batch.*`, or reported as unused; the table is in `docs/batch_files.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import read_json
from ds_llmpq.models.description import read_config, read_description
from ds_llmpq.models.families import find_family
from ds_llmpq.validation import AboveZero, Number, OneOrMany, Plain, Share, validate

NAME = "generation_config.json"
_MOST_BYTES = 16 << 20
_REMEDY = "mend or remove that key"
T = TypeVar("T")
Sequence = tuple[int, ...]  # of token ids


def _filled(tokens: Any) -> Any:
    if tokens == ():
        raise ValueError("must be a token id or a list of them")
    return tokens


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


_Token = Annotated[int, Ge(-(2**31)), Lt(2**31)]  # checked against the vocabulary below
_Word = Annotated[tuple[_Token, ...], MinLen(1), MaxLen(100_000)]
_Words = Annotated[tuple[T, ...], MaxLen(100_000)]
_Count = Annotated[int, Ge(0), Lt(2**31)]
_ShareAboveZero = Annotated[float, Ge(1e-9), Le(1)]


@dataclass(frozen=True)
class _Honoured:
    """The keys of the file that are used."""

    eos_token_id: OneOrMany[_Token] | None = None
    repetition_penalty: Annotated[float, Ge(1e-6), Le(1e6)] | None = None
    no_repeat_ngram_size: _Count | None = None
    sequence_bias: _Words[tuple[_Word, Number]] | None = None
    bad_words_ids: _Words[_Word] | None = None
    min_length: _Count | None = None
    min_new_tokens: _Count | None = None
    forced_bos_token_id: _Token | None = None
    forced_eos_token_id: Annotated[OneOrMany[_Token], AfterValidator(_filled)] | None = None
    exponential_decay_length_penalty: tuple[Annotated[Number, AfterValidator(_whole)], AboveZero] | None = None
    suppress_tokens: OneOrMany[_Token] | None = None
    begin_suppress_tokens: OneOrMany[_Token] | None = None
    top_h: _ShareAboveZero | None = None
    min_p: Share | None = None
    typical_p: _ShareAboveZero | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    stop_strings: OneOrMany[Annotated[str, MinLen(1), MaxLen(10_000)]] | None = None


@dataclass(frozen=True)
class Generation:
    """Defaults of a checkpoint, with transformers' names and units. The defaults below have no effect.

    `repetition_penalty`, `min_p` and `min_new_tokens` apply to rows that give none. The truncations of the distribution
    (`min_p` to `eta_cutoff`) apply where a row samples. Token ids are below the vocabulary's size. `left_out`: keys of
    the file that are not used, with the reason.
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
        """The keys that have an effect, except the end-of-sequence tokens."""
        plain = [entry for entry in fields(self) if entry.name not in ("eos_token_ids", "left_out")]
        return {entry.name: value for entry in plain if (value := getattr(self, entry.name)) != entry.default}

    def lines(self) -> list[str]:
        """For the user: at most one line on defaults that are used, and one on those that are not."""
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
    """The defaults in the folder `path`; `config` is its config.json. `UserError`: no JSON object, or an invalid
    value."""
    file = Path(path) / NAME
    given = _read(file) if file.exists() or file.is_symlink() else None
    values = {key: value for key, value in (given or {}).items() if value is not None}
    keys = validate(_Honoured, values, str(file), _REMEDY, ignore_unknown=True)
    eos, ending = _choose_eos(file, given, config)
    left_out = [(f"{key} {quote(values[key])}", why) for key, why in _explain_left_out(values).items()]
    return Generation(eos_token_ids=eos, left_out=(*left_out, *ending), **_convert(keys, file, vocabulary))


def _read(file: Path) -> dict[str, Any]:
    what, remedy = "Generation defaults", "fetch the file again, or remove it"
    return validate(Plain, read_json(file, what, remedy, _MOST_BYTES), f"{what} {file}", remedy)


def _choose_eos(
    file: Path, given: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> tuple[Sequence, list[tuple[str, str]]]:
    """The end-of-sequence tokens: as in transformers, those of generation_config.json if it exists, else those of
    config.json. If the file names none, answers would never end, so config.json decides in that case too."""
    if given is not None and given.get("eos_token_id") is not None:
        return _read_eos(file, given["eos_token_id"]), []
    family = find_family(config.get("model_type"))
    named = config.get("eos_token_id", family.eos_token_id if family else None)
    found = () if named is None else _read_eos(file.with_name("config.json"), named)
    if given is None or not found:
        return found, []
    return found, [("eos_token_id null", f"answers end at config.json's {quote(_as_lists(found))}")]


def _read_eos(file: Path, value: Any) -> Sequence:
    return _listed(validate(_Honoured, {"eos_token_id": value}, str(file), _REMEDY).eos_token_id)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _convert(keys: _Honoured, file: Path, vocabulary: int) -> dict[str, Any]:
    """As `Generation` has them. `UserError`: a token that would have to be generated is not in the vocabulary."""
    found = {name: value for name, value in vars(keys).items() if value is not None and name != "eos_token_id"}
    for name in ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "stop_strings"):
        if name in found:
            found[name] = _listed(found[name])
    for name in ("suppress_tokens", "begin_suppress_tokens"):  # unknown ids cannot be generated anyway
        if name in found:
            found[name] = tuple(token for token in found[name] if 0 <= token < vocabulary)
    named = {
        "forced_bos_token_id": _listed(found.get("forced_bos_token_id", ())),
        "forced_eos_token_id": found.get("forced_eos_token_id", ()),
        "bad_words_ids": chain(*found.get("bad_words_ids", ())),
        "sequence_bias": chain(*(words for words, _ in found.get("sequence_bias", ()))),
    }
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocabulary:
                bound = f"of token ids from 0 to {vocabulary - 1}"
                raise UserError(f"{file}: {name} has {token}, but must be {bound}; {_REMEDY}.")
    if "sequence_bias" in found:
        found["sequence_bias"] = tuple(dict(found["sequence_bias"]).items())
    return found


_BATCH = "rows and batch.* decide"
_ONE_ANSWER = "every row gets one answer, chosen token by token"
# key -> (values without effect, why other values are not used); keys that never change answers are left out
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
    """Keys whose value changes the answers of `generate`, but not ours."""
    found = {key: why for key, (neutral, why) in _LEFT_OUT.items() if key in values and values[key] not in neutral}
    if values.get("cache_implementation") == "quantized":
        found["cache_implementation"] = "the cache is kept as planned"
    return found


def _as_lists(value: Any) -> Any:
    """Lists as JSON has them."""
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple) else value
