"""In which order requests run: as they came, or neighbours of like prompt length, which need less padding."""

from __future__ import annotations

from ds_llmpq.batch.prompts import PreparedRequest
from ds_llmpq.errors import UserError

ORDERINGS = ("arrival", "prompt_length")


def ordered(prepared: list[PreparedRequest], ordering: str = "arrival") -> list[PreparedRequest]:
    """`arrival` keeps the file's order. `prompt_length` runs the longest prompts first, equal ones in file order:
    what does not fit in memory then shows at the start, and the last, partial wave is the cheapest."""
    if ordering == "arrival":
        return list(prepared)
    if ordering == "prompt_length":
        return sorted(prepared, key=lambda each: -each.prompt_tokens)
    raise UserError(f"ordering is {ordering!r} but must be one of {', '.join(ORDERINGS)}.")


def waves(prepared: list[PreparedRequest], sequences: int, ordering: str = "arrival") -> list[list[PreparedRequest]]:
    """Batches of `sequences` requests (the last may be smaller), each of which runs to its end before the next."""
    if sequences < 1:
        raise UserError(f"sequences is {sequences} but must be at least 1.")
    rows = ordered(prepared, ordering)
    return [rows[start : start + sequences] for start in range(0, len(rows), sequences)]


def padding_share(batches: list[list[PreparedRequest]]) -> float:
    """Share of prefill positions that are padding when each batch is padded to its longest prompt."""
    padded = sum(len(batch) * max(each.prompt_tokens for each in batch) for batch in batches)
    return 1 - sum(each.prompt_tokens for batch in batches for each in batch) / padded if padded else 0.0
