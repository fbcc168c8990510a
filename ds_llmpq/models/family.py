"""The data that defines a model family, and the description of one `config.json`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, MaxLen

from ds_llmpq.errors import UserError
from ds_llmpq.models.spec import ACTIVATIONS, DecoderSpec
from ds_llmpq.validation import AboveZero, Positive, one_of, validate

CONFIG = "config.json"
REMEDY = "mend the file, or fetch it again"
Renamed = tuple[tuple[str, str], ...]  # (ours, theirs): parts of names, replaced in this order

# types for keys of a config.json, beside those of `validation`
Layers = Annotated[int, Ge(1), Le(10_000)]
Experts = Annotated[int, Ge(1), Le(10_000)]
Activation = one_of(*ACTIVATIONS)
FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = Annotated[tuple[one_of(FULL, SLIDING), ...], MaxLen(10_000)]
Epsilon = Annotated[float, Ge(0), Le(1e3)]
Part = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    keys: a dataclass of the keys of config.json that affect the computation, with the defaults of transformers'
    configuration class; build_spec takes its instance. layers: the checkpoint's name for the list of decoder layers.
    ends: module of `ends.Embedding` or `ends.Head` -> prefix of its tensor names. names: renames parts of names inside
    a layer. aliases: other name of a key -> its field. eos_token_id: the default if config.json has none.
    """

    keys: type
    build_spec: Callable[[Any], DecoderSpec]
    layers: str
    ends: Mapping[str, str]
    names: Renamed
    aliases: Mapping[str, str] = field(default_factory=dict)
    eos_token_id: int | None = None

    @property
    def embedding_tensor(self) -> str:
        return f"{self.ends['embed_tokens']}.weight"

    def rename(self, name: str) -> str:
        """The checkpoint's name for a module or parameter of a decoder layer, without the layer's prefix."""
        for ours, theirs in self.names:
            name = name.replace(ours, theirs)
        return name

    def read_spec(self, config: Mapping[str, Any]) -> DecoderSpec:
        """`UserError`: a key is missing, or its value has a wrong type, is out of range or contradicts others."""
        return self.build_spec(self.read_keys(config))

    def read_keys(self, config: Mapping[str, Any]) -> Any:
        """An instance of `keys`. null counts as missing, unless the key's type allows None."""
        hints = get_type_hints(self.keys)
        given = {}
        for key in fields(self.keys):
            names = (*(alias for alias, name in self.aliases.items() if name == key.name), key.name)
            name = next((name for name in names if config.get(name) is not None), None)
            if name is not None:
                given[key.name] = config[name]
            elif key.name in config and NoneType in get_args(hints[key.name]):
                given[key.name] = None
        return validate(self.keys, given, CONFIG, REMEDY)


@dataclass(frozen=True)
class Description:
    """What a config.json describes. dtype: of the stored weights, if it is given."""

    model_type: str
    family: Family
    spec: DecoderSpec
    dtype: str | None


def require_multiple(name: str, value: int, of: str, divisor: int) -> None:
    """`UserError` unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise UserError(f"{CONFIG} has {name}={value}, not a multiple of {of}={divisor}; {REMEDY}.")


__all__ = [
    "CONFIG", "FULL", "REMEDY", "SLIDING", "AboveZero", "Activation", "Description", "Epsilon", "Experts", "Family",
    "LayerTypes", "Layers", "Part", "Positive", "Renamed", "require_multiple",
]  # fmt: skip
