"""Finds the prefix, such as a system prompt, whose computing once saves most prompt tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

from ds_llmpq.integers import round_up

_LOOKED_AT = 2000  # prompts, evenly taken from all
_LEAST_TOKENS = 32  # of a prefix
_LEAST_SHARE = 0.1  # of all prompts' tokens that must be saved: passes over shared and other prompts are apart
_TOKEN_BYTES = 4


def find_shared_prefix(prompts: Sequence[array], most_tokens: int, block: int = 1) -> tuple[int, ...]:
    """The prefix that saves most tokens: at most `most_tokens` long, in whole blocks of the cache; () where none pays.
    prompts: token ids as int32. Only prompts longer than the prefix count."""
    if not prompts:
        return ()
    looked_at = prompts[:: -(-len(prompts) // _LOOKED_AT)]
    # as bytes they sort fast; any order will do that puts those of one beginning side by side
    ordered = sorted(prompt[: min(len(prompt) - 1, most_tokens)].tobytes() for prompt in looked_at)
    common = [_count_common(*pair) // block * block for pair in pairwise(ordered)]
    saved, tokens, place = _find_largest(common)
    if tokens < round_up(_LEAST_TOKENS, block) or saved < _LEAST_SHARE * sum(map(len, looked_at)):
        return ()
    return tuple(array("i", ordered[place][: tokens * _TOKEN_BYTES]))


def count_shared(prompt: Sequence[int], prefix: Sequence[int]) -> int:
    """The prefix's tokens, if the prompt goes on behind them: its last token must be computed. Both of one type."""
    return len(prefix) if len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix else 0


def _count_common(one: bytes, other: bytes) -> int:
    """Tokens that both begin with."""
    low, high = 0, min(len(one), len(other)) // _TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * _TOKEN_BYTES] == other[: middle * _TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _find_largest(heights: Sequence[int]) -> tuple[int, int, int]:
    """(area, height, start) of the largest rectangle under the heights of neighbouring columns: that many neighbours
    and one more share so many tokens, which are computed once instead."""
    best, rising = (0, 0, 0), []  # (start, height), ever higher
    for place, height in enumerate([*heights, 0]):
        start = place
        while rising and rising[-1][1] >= height:
            start, full = rising.pop()
            best = max(best, (full * (place - start), full, start))
        rising.append((start, height))
    return best
