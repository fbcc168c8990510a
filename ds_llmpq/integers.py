"""Arithmetic of whole numbers that several packages share."""

from __future__ import annotations


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def round_up_coarsely(value: int) -> int:
    """The next of 1, 2 ... 16, 24, 32 ... 128, and above it of 16 numbers between a power of two and the next. Up to
    4,096 these are 110 numbers, on average 3 % above the value."""
    if value <= 16:
        return value
    return round_up(value, max(8, 1 << (value - 1).bit_length() - 5))
