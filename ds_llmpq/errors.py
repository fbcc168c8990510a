"""The exception for a user's mistake, whose message is shown without a traceback."""

import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

MOST_CHARACTERS = 1_200  # of a message; longer ones are cut in their middle
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, directions, halves of characters, line separators


def make_printable(text: object, most: int = MOST_CHARACTERS, keep: str = "\n") -> str:
    """`text` made safe for a terminal: control characters, changes of direction and half characters are escaped, except
    those in `keep`, and what is longer than `most` characters loses its middle."""
    text = _cut(str(text), most)
    if text.isascii() and text.isprintable():
        return text
    escaped = (
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNSAFE and character not in keep
        else character
        for character in text
    )
    return _cut("".join(escaped), most)


def _cut(text: str, most: int) -> str:
    """Cuts out the middle, because the remedy is at the end."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3 - 5
    return f"{text[:head]} ... {text[len(text) - tail :]}"


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an exception's message, or its type if it has none; safe for a terminal."""
    return make_printable((str(error).splitlines() or [type(error).__name__])[0], most, keep="")


def quote(value: object, most: int = 60) -> str:
    """A value from outside for a message: on one line, shortened."""
    if isinstance(value, (str, bytes, list, tuple, dict)) and len(value) > most:
        value = value[:most] if isinstance(value, (str, bytes, list, tuple)) else dict(list(value.items())[:most])
        return make_printable(repr(value), 10 * most, keep="")[: most - 3] + "..."
    try:
        text = make_printable(repr(value), 10 * most, keep="")
    except (ValueError, RecursionError):  # whole numbers of thousands of digits; nested without end
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else text[: most - 3] + "..."


class UserError(Exception):
    """The user's input cannot be used. The message is one sentence: the value, the bound, the remedy. It is made safe
    for a terminal and shortened, because it may quote input."""

    exit_code = 1

    def __init__(self, message: object = ""):
        super().__init__(make_printable(message))


class InfeasibleError(UserError):
    """No plan exists. The message names the binding constraint and the smallest change that would make it feasible."""

    exit_code = 2


class Interrupted(UserError):
    """The user ended the run."""

    exit_code = 130


class PortTaken(UserError):
    """Another process listens on the ranks' meeting point."""


class RunFailed(UserError):
    """A started pipeline failed for good. `failure`: the record in failure.json."""

    def __init__(self, message: object, failure: Mapping[str, Any]):
        super().__init__(message)
        self.failure = failure


def print_error(error: UserError) -> int:
    """Shows the message, as a sentence; returns the exit code."""
    text = str(error)
    stop = "." if text[-1:].isalnum() or text.endswith((")", "'", '"')) else ""
    print(f"error: {text}{stop}", file=sys.stderr)
    return error.exit_code
