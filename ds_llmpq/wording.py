"""Numbers as people write them: no exponents, thousands apart, "1 layer" but "2 layers"."""

import math
import shlex

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def format_number(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, never fewer than stand before the point: 1380 -> "1,380", 0.0316 ->
    "0.0316". What is too small for twelve decimals is 0."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{value:,.{min(max(decimals, 0), 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_size(amount: float) -> str:
    """Bytes in the largest unit of which there is one: "1.5 GiB"."""
    for unit, factor in _UNITS:
        if amount >= factor:
            return f"{amount / factor:.1f} {unit}"
    return f"{amount:.0f} B"


def format_percent(share: float, spec: str = ".0") -> str:
    """0.125 -> "12 %"; `spec`: what a format specification has before its %."""
    return f"{share:{spec}%}".replace("%", " %")


def pluralize(number: int, noun: str) -> str:
    """ "1 layer", "2 layers", "3 micro-batches"."""
    plural = "es" if noun.endswith(("s", "sh", "ch", "x")) else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def quote_argument(key: str, value: object) -> str:
    """`key=value` as a shell takes it, whatever the path holds."""
    return shlex.quote(f"{key}={value}")
