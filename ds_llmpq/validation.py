"""Validates values from outside with pydantic; a mistake becomes one sentence.

Loaders read a file with `ds_llmpq.files` and pass its values to `validate` (JSON), `validate_cells` (a row of CSV) or
`validate_line` (files with very many JSON lines, written by this program), with the dataclass or type they expect.
Nothing is converted: `"3"` is not a number, and 3.0 is not an integer. The types below have bounds; a dataclass's
`__post_init__` checks fields against each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import AfterValidator, AllowInfNan, ConfigDict, Discriminator, FailFast, Tag, TypeAdapter, ValidationError

from ds_llmpq.errors import UserError, make_printable, quote

T = TypeVar("T")
MOST_COUNT = 2**53  # exact as a float too
MOST_SIZE = 1e300  # products of a few stay finite as far as they are compared
_WHOLE = re.compile("0|[1-9][0-9]{0,15}")
_ONE, _MANY = "\0one", "\0many"  # marks in pydantic's locations; no valid key begins so


def _plain(text: str) -> str:
    if make_printable(text, len(text), keep="") != text:
        raise ValueError("must hold no control characters")
    return text


def _not_negative(value: float) -> float:
    if not value >= 0:  # nor is NaN
        raise ValueError("must be a number of at least 0")
    return value


def _whole(key: str) -> int:
    if not _WHOLE.fullmatch(key):  # int() takes more: "01", " 1", "+1", "1_0"
        raise ValueError("must be a whole number in plain digits")
    return int(key)


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must list each value once")
    return values


def one_of(*values: Any) -> Any:
    """The type of a value that is one of these, which all have one type."""

    def check(value: Any) -> Any:
        if value not in values:
            raise ValueError(f"must be {'one of ' * (len(values) > 1)}{', '.join(map(str, values))}")
        return value

    return Annotated[type(values[0]), AfterValidator(check)]


Count = Annotated[int, Ge(0), Le(MOST_COUNT)]
Positive = Annotated[int, Ge(1), Le(MOST_COUNT)]
Bits = Annotated[int, Ge(0), Le(64)]
LayerBits = Annotated[int, Ge(1), Le(64)]
Number = Annotated[float, Ge(-MOST_SIZE), Le(MOST_SIZE)]
Amount = Annotated[float, Ge(0), Le(MOST_SIZE)]
Seconds = Annotated[float, Ge(0), Le(1e12)]
PossiblyInfinite = Annotated[float, AllowInfNan(True), AfterValidator(_not_negative)]
Share = Annotated[float, Ge(0), Le(1)]
AboveZero = Annotated[float, Gt(0), Le(MOST_SIZE)]
Name = Annotated[str, MinLen(1), MaxLen(1_000), AfterValidator(_plain)]
Label = Annotated[str, MaxLen(10_000), AfterValidator(_plain)]  # may be empty
Note = Annotated[str, MaxLen(100_000), AfterValidator(lambda text: make_printable(text, 2_000, keep=""))]
PathText = Annotated[str, MinLen(1), MaxLen(4_096), AfterValidator(_plain)]
Digest = Annotated[str, MinLen(1), MaxLen(128), AfterValidator(_plain)]
Many = Annotated[tuple[T, ...], MaxLen(1_000_000), FailFast()]
Some = Annotated[tuple[T, ...], MinLen(1), MaxLen(1_000_000), FailFast()]
Distinct = Annotated[tuple[T, ...], MinLen(1), MaxLen(10_000), AfterValidator(_distinct)]
OneOrMany = Annotated[
    Annotated[T, Tag(_ONE)] | Annotated[tuple[T, ...], MaxLen(1_000_000), Tag(_MANY)],
    Discriminator(lambda value: _MANY if isinstance(value, list) else _ONE),
]
Table = Annotated[dict[Name, T], MaxLen(100_000)]
TableByNumber = Annotated[dict[Annotated[str, AfterValidator(_whole)], T], MaxLen(100_000)]
Plain = Annotated[dict[str, Any], MaxLen(100_000)]  # any JSON object


def validate(kind: type[T], value: Any, where: str, remedy: str, *, ignore_unknown: bool = False) -> T:
    """Parsed JSON as a `kind`. `UserError`: the first mistake, with its dotted path below `where`, what is there, what
    must be there, and the remedy. `ignore_unknown` allows keys that the dataclass lacks."""
    if ignore_unknown and isinstance(value, dict):
        value = {name: value[name] for name in kind.__dataclass_fields__ if name in value}
    try:
        text = json.dumps({"": value})
    except (RecursionError, TypeError, ValueError) as error:  # of a caller in Python: none of them is parsed JSON
        raise UserError(f"{where} cannot be read ({type(error).__name__}); {remedy}.") from None
    try:
        return _adapter(dict[str, kind]).validate_json(text)[""]
    except ValidationError as error:
        raise UserError(_sentence(error, where, remedy)) from None


def validate_cells(kind: type[T], cells: Mapping[str, Any], where: str, remedy: str) -> T:
    """`validate` for cells of text, as in CSV. Nested mappings become nested dataclasses."""
    try:
        return _adapter(dict[str, kind]).validate_strings({"": cells})[""]
    except ValidationError as error:
        raise UserError(_sentence(error, where, remedy)) from None


def validate_line(kind: type[T], line: bytes, where: str, remedy: str) -> T:
    """`validate` for a line of JSON, parsed and checked in one step, which is three times as fast. Unknown keys are
    ignored; the last one of a repeated key counts."""
    try:
        return _adapter(tuple[kind], "ignore").validate_json(b"[" + line + b"]")[0]
    except ValidationError as error:
        raise UserError(_sentence(error, where, remedy)) from None


@cache
def _adapter(kind: Any, unknown: str = "forbid") -> TypeAdapter:
    """`kind` is a dict or tuple around the type, because pydantic accepts a configuration for that, but not for a
    standard dataclass."""
    return TypeAdapter(kind, config=ConfigDict(strict=True, extra=unknown, allow_inf_nan=False))


def _sentence(error: ValidationError, where: str, remedy: str) -> str:
    first = error.errors(include_url=False)[0]
    place = tuple(key for key in first["loc"][1:] if key not in (_ONE, _MANY))
    kind, key = first["type"], place[-1] if place else ""
    if kind == "json_invalid" or not first["loc"]:  # of `validate_line`
        reason = first.get("ctx", {}).get("error", "more than one value")
        return f"{where} cannot be read as JSON ({reason}); {remedy}."
    if kind in ("missing", "missing_argument"):
        if not place:
            return f"{where} is empty; {remedy}."
        if isinstance(key, int):
            path, found = _path(where, place[:-1]), quote(first["input"])
            return f"{path} is {found}, but must have more than {key} entries; {remedy}."
        return f"{_path(where, place[:-1])} lacks the key {quote(key)}; {remedy}."
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{_path(where, place[:-1])} has the unknown key {quote(key)}; {remedy}."
    wanted = re.sub("^(Input|Value error,|Tuple|List|Dictionary|String) ", "", first["msg"])
    wanted = wanted.replace("should ", "must ").replace(" after validation", "")
    what = "is"
    if key == "[key]":  # so pydantic ends the place of a key
        place, what = place[:-2], "has the key"
    return f"{_path(where, place)} {what} {quote(first['input'])}, but {wanted[:1].lower() + wanted[1:]}; {remedy}."


def _path(where: str, place: tuple[Any, ...]) -> str:
    parts = (f"[{key}]" if isinstance(key, int) else f".{make_printable(key, 60, keep='')}" for key in place)
    path = "".join(parts)
    if where.isidentifier():  # the artefact's own name begins the path: problem.devices[0].name
        return where + path
    return f"{where}: {path.removeprefix('.')}" if path else where


def check_least(group: str, settings: object, **least: float) -> None:
    """`UserError` for a value of a configuration group that lies below its bound; null is allowed."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # nor NaN
            raise UserError(f"{group}.{name} is {value} but must be at least {bound}.")
