"""Strict reading of JSON objects: a mistake is one sentence with the key's path, its value, bound and remedy."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_llmpq.errors import UserError, printable, shown

MOST_CHARACTERS = 4096  # of a name or path
MOST_INTEGER = 2**53
_MOST = 10**300  # above it, Python's whole numbers are no floats any more


def keys(value: Any, path: str, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """The object at `path`, holding every required key and no unknown one."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path} is {shown(value)}, but must be an object with the keys {', '.join(required)}.")
    for key in value:
        if key not in required and key not in optional:
            known = ", ".join([*required, *optional])
            raise UserError(f"{path} has the unknown key {shown(key)}; remove it, the keys known there are {known}.")
    for key in required:
        if key not in value:
            raise UserError(f"{path} lacks the key {key!r}; add it.")
    return value


def mapping(value: Any, path: str) -> Mapping[str, Any]:
    """An object with any keys."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path} is {shown(value)}, but must be an object.")
    return value


def number(value: Any, path: str, *, low: float = 0.0, finite: bool = True) -> float:
    """A real number of at least `low`; integers stay integers so that byte counts remain exact."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise UserError(f"{path} is {shown(value)}, but must be a number of at least {low:g}.")
    if value < low or (isinstance(value, int) and value > _MOST) or (finite and math.isinf(value)):
        raise UserError(f"{path} is {shown(value)}, but must be a finite number of at least {low:g}; correct it.")
    return value


def integer(value: Any, path: str, *, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST_INTEGER:
        raise UserError(f"{path} is {shown(value)}, but must be an integer of at least {low}, at most {MOST_INTEGER}.")
    return value


def text(value: Any, path: str, choices: Sequence[str] = ()) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{path} is {shown(value)}, but must be a non-empty string.")
    if len(value) > MOST_CHARACTERS or printable(value, len(value), keep="") != value:
        raise UserError(
            f"{path} is {shown(value)}, but must have at most {MOST_CHARACTERS} characters, none of them a control "
            "character."
        )
    if choices and value not in choices:
        raise UserError(f"{path} is {shown(value)}, but must be one of {', '.join(choices)}.")
    return value


def note(value: Any, path: str) -> str:
    """A sentence for people, made fit for a terminal."""
    if not isinstance(value, str):
        raise UserError(f"{path} is {shown(value)}, but must be a string.")
    return printable(value, 2_000, keep="")


def boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{path} is {shown(value)}, but must be true or false.")
    return value


def items(value: Any, path: str, *, length: int | None = None, empty: bool = False) -> Sequence[Any]:
    """A list, not empty unless allowed, of exactly `length` entries where given."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path} is {shown(value)}, but must be a list.")
    if length is not None and len(value) != length:
        raise UserError(f"{path} has {len(value)} entries, but must have {length}; add or remove some.")
    if not value and not empty:
        raise UserError(f"{path} is an empty list, but needs at least one entry.")
    return value


def distinct_integers(value: Any, path: str) -> tuple[int, ...]:
    """A list of different integers of at least 1, in the order given."""
    numbers = tuple(integer(entry, f"{path}[{i}]") for i, entry in enumerate(items(value, path)))
    for i, entry in enumerate(numbers):
        if entry in numbers[:i]:
            raise UserError(f"{path}[{i}] is {entry}, which the list already holds; list each value once.")
    return numbers


def by_integer(
    value: Any, path: str, allowed: Sequence[int], read: Callable[[Any, str], Any], *, complete: bool
) -> dict[int, Any]:
    """An object whose keys are the integers `allowed` written as strings; `complete` asks for all of them."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path} is {shown(value)}, but must be an object by {', '.join(map(str, allowed))}.")
    names = {str(entry): entry for entry in allowed}
    for key in value:
        if key not in names:
            raise UserError(
                f"{path} has the unknown key {shown(key)}; remove it or declare it, known are {', '.join(names)}."
            )
    if complete:
        for name in names:
            if name not in value:
                raise UserError(f"{path} lacks the key {name!r}; add it.")
    return {entry: read(value[name], f"{path}.{name}") for name, entry in names.items() if name in value}


def seconds_or_absent(value: Any, path: str) -> float | None:
    """A latency, or None for null and infinity: not available."""
    if value is None:
        return None
    value = number(value, path, finite=False)
    return None if math.isinf(value) else float(value)
