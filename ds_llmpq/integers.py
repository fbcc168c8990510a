"""Arithmetic of whole numbers that several packages share."""

from __future__ import annotations


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
